"""The README.md of a run directory, written from its configuration."""

from pathlib import Path

from colossus.spec.run import RunConfig
from colossus.units import format_bytes, format_count


def readme(path: Path, config: RunConfig) -> str:
    """What the run is, what each file is, and what can be done with it."""
    return "\n".join([f"# {path.name}", "", *_what(config), "", *_files(), "", *_commands(path)]) + "\n"


def _what(config: RunConfig) -> list[str]:
    model, data = config.model, config.data
    sources = ", ".join(f"`{source.path}`" for source in data.sources)
    lines = [
        f"A run of Colossus: a model of {format_count(model.num_params())} parameters (`{model.name}`: "
        f"{model.num_layers} layers, {model.hidden_size} wide, vocabulary {model.vocab_size:,}, "
        f"context {model.context_tokens:,} tokens), trained for {config.budget.describe()} on {sources}.",
        "",
        f"Each step trains on {config.batch.sequences} sequences of {config.batch.sequence_tokens} tokens "
        f"with {config.optimizer.kind} and a {config.schedule.kind} schedule; seed {config.seed}. "
        f"{data.heldout_fraction:.0%} of the documents are held out.",
    ]
    if config.plan is not None:
        plan = config.plan
        lines += [
            "",
            f"Planned for {plan.machine.chip} with {plan.machine.num_threads} threads: {plan.dtype}, "
            f"{'compiled' if plan.compile else 'not compiled'}, "
            f"{plan.num_micro_batches} × {plan.micro_batch_sequences} sequences a step; "
            f"predicted peak memory {format_bytes(plan.estimate.memory.total_bytes)}. The reasons are in "
            f"`config.toml`, under `[plan.reasons]`.",
        ]
    return lines


def _files() -> list[str]:
    return [
        "| File | What it is |",
        "|---|---|",
        "| `config.toml` | everything that decides the run, with the plan; start a new run like it with "
        "`colossus train config.toml` |",
        "| `environment.json` | machine, versions of Python and packages, command line |",
        "| `git.json` | commit of the code and uncommitted changes (where it ran from a checkout) |",
        "| `events.jsonl` | all that happened, one event a line: steps, evaluations, checkpoints, decisions, "
        "faults |",
        "| `checkpoints/` | the newest states, enough to go on bit for bit |",
        "| `tokenizer/` | text to tokens and back |",
        "| `summary.json` | what it came to (when it has ended) |",
        "| `sample.txt` | text that the trained model wrote |",
        "| `curves.png` | loss, held-out bits per byte, learning rate, throughput |",
    ]


def _commands(path: Path) -> list[str]:
    return [
        "```sh",
        f"colossus train --resume {path}                        # go on from the newest checkpoint",
        f"colossus generate {path} --prompt 'def main('         # let it write",
        f"colossus runs show {path}                             # how it went",
        "```",
    ]
