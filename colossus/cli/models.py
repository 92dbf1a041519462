"""`colossus models` and `colossus models show`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from colossus.cli.group import Group
from colossus.cli.options import JsonOption

if TYPE_CHECKING:
    from colossus.spec.model import AttentionSpec, LatentAttentionSpec, MlpSpec, ModelSpec, MoeSpec

app = typer.Typer(cls=Group, invoke_without_command=True, rich_markup_mode=None)


@app.callback(
    epilog="""\b
Examples:
  colossus models
  colossus models --json | jq '.[] | select(.family == "Grok")'
  colossus models show llama3.1-405b
  colossus models show grok-2 --json > mine.json
"""
)
def models(context: typer.Context, json: JsonOption = False) -> None:
    """List the models of the zoo, or show one in detail.

    FLOPs are those of training on one token, in sequences as long as the model's context.
    """
    if context.invoked_subcommand is not None:
        return
    from colossus import zoo

    found = [zoo.find(name) for name in zoo.names()]
    if json:
        from json import dumps

        typer.echo(dumps([_facts(model) for model in found]))
        return
    from rich.table import Table

    from colossus.cli.screen import screen
    from colossus.units import format_count

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("name", "family"):
        table.add_column(heading, no_wrap=True)
    for heading in ("params", "active", "layers", "hidden", "context", "FLOPs/token"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("source", style="dim")
    for model in found:
        facts = _facts(model)
        table.add_row(
            model.name,
            facts["family"],
            format_count(facts["num_params"]),
            format_count(facts["num_active_params"]),
            str(facts["layers"]),
            f"{facts['hidden']:,}",
            f"{facts['context']:,}",
            f"{facts['flops_per_token']:.2e}",
            facts["source"],
        )
    screen().print(table)


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A model's name, or a .toml or .json file of one.")
    ],
    json: JsonOption = False,
) -> None:
    """Show one model: what it is made of, and what it costs.

    With --json the whole specification is in `model`; saved as a .json file, it can be named in place of a model.
    """
    from colossus import zoo

    model = zoo.load(name)
    known = model.name in zoo.names() and zoo.find(model.name) == model
    facts = _facts(model) if known else _facts(model, family="", source=name)
    if json:
        from json import dumps

        typer.echo(dumps({**facts, "model": model.model_dump(mode="json")}))
        return
    from rich.table import Table

    from colossus.cli.screen import screen

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for label, text in _lines(model):
        table.add_row(label, text)
    table.add_row("source", facts["source"])
    console = screen()
    console.print(f"{model.name}\n", style="bold")
    console.print(table)


def _facts(model: "ModelSpec", family: str | None = None, source: str | None = None) -> dict[str, Any]:
    from colossus import zoo

    return {
        "name": model.name,
        "family": zoo.family(model.name) if family is None else family,
        "num_params": model.num_params(),
        "num_active_params": model.num_active_params(),
        "layers": model.num_layers,
        "hidden": model.hidden_size,
        "context": model.context_tokens,
        "flops_per_token": model.flops_per_token(model.context_tokens),
        "source": zoo.source(model.name) if source is None else source,
    }


def _lines(model: "ModelSpec") -> list[tuple[str, str]]:
    """A label and a text for each thing to say of a model."""
    from colossus.units import format_bytes

    first = model.first_layers
    mlp = (
        _mlp(model.mlp)
        if first is None
        else f"{_mlp(model.mlp)}; in the first {first.num_layers}: {_mlp(first.mlp)}"
    )
    tokens = sorted({min(4096, model.context_tokens), model.context_tokens})
    tied = ", tied to the embeddings" if model.tied_embeddings else ""
    cache = format_bytes(model.kv_cache_bytes(model.context_tokens, "bfloat16"))
    return [
        ("parameters", f"{model.num_params():,}"),
        ("active", f"{model.num_active_params():,} for one token"),
        ("layers", f"{model.num_layers} × {model.hidden_size:,}"),
        ("attention", _attention(model.attention)),
        ("feed-forward", mlp),
        ("norms", f"{'RMS' if model.norm.kind == 'rms' else 'LayerNorm'}, {model.norm_placement}"),
        ("vocabulary", f"{model.vocab_size:,}{tied}"),
        ("context", f"{model.context_tokens:,} tokens"),
        *(
            ("training", f"{model.flops_per_token(n):.3e} FLOPs per token, in sequences of {n:,}")
            for n in tokens
        ),
        ("weights", f"{format_bytes(model.weight_bytes('bfloat16'))} in bfloat16"),
        ("cache", f"{cache} in bfloat16 at full context"),
    ]


def _attention(attention: "AttentionSpec | LatentAttentionSpec") -> str:
    if attention.kind == "latent":
        return (
            f"latent, {attention.num_heads} heads of {attention.nope_head_dim} + {attention.rope_head_dim}, "
            f"keys and values from {attention.kv_lora_rank} channels"
        )
    parts = [f"{attention.num_heads} heads of {attention.head_dim}"]
    if attention.num_kv_heads != attention.num_heads:
        parts.append(f"{attention.num_kv_heads} of keys and values")
    if attention.window is not None:
        which = "all layers" if attention.window.full_every is None else "some layers"
        parts.append(f"a window of {attention.window.tokens:,} tokens in {which}")
    return ", ".join(parts)


def _mlp(mlp: "MlpSpec | MoeSpec") -> str:
    if mlp.kind == "dense":
        return f"{mlp.intermediate_size:,} {mlp.activation}"
    shared = f", beside a shared {mlp.shared.intermediate_size:,}" if mlp.shared else ""
    return f"{mlp.top_k} of {mlp.num_experts} experts of {mlp.intermediate_size:,} {mlp.activation}{shared}"
