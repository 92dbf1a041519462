"""The README.md of an exported model: what it is and where it comes from, as the run's own records say."""

import json
import shlex
from importlib import metadata
from pathlib import Path

from colossus.checkpoint.hugging_face.tokenizer_files import opens_as_it_came
from colossus.events import StepDone
from colossus.observe.history import history
from colossus.observe.meters import smooth
from colossus.observe.run_directory import RunDirectory
from colossus.spec.model import Dtype
from colossus.spec.run import RunConfig
from colossus.units import format_count
from colossus.zoo.hugging_face import architecture_of


def model_card(
    run: RunDirectory, config: RunConfig, step: int, dtype: Dtype, imported_from: str | None
) -> str:
    """In Markdown, with the table that model hubs read in front. `step` is the checkpoint's."""
    told = history(run.events())
    steps = [one for one in told.steps if one.step < step]
    evaluations = [one for one in told.evaluations if one.step <= step]
    rows = [
        ("Parameters", _parameters(config)),
        ("Architecture", f"`{config.model.name}`: {config.model.num_layers} layers, {config.model.hidden_size} wide, "
         f"vocabulary {config.model.vocab_size:,}, context {config.model.context_tokens:,} tokens"),
        ("Started from", f"the weights of `{imported_from}`" if imported_from else "random weights"),
        ("Data", ", ".join(f"`{source.path}`" for source in config.data.sources)
         + f"; {config.data.heldout_fraction:.0%} of the documents held out"),
        ("Trained", f"{step:,} steps, {format_count(_tokens(steps, config, step))} tokens, in sequences of "
         f"{config.batch.sequence_tokens:,}"),
        ("Optimizer", f"{config.optimizer.kind}, learning rate {config.optimizer.learning_rate:g}, "
         f"{config.schedule.kind} schedule, seed {config.seed}"),
    ]  # fmt: skip
    if steps:
        loss = smooth(one.loss for one in steps)[-1]
        rows.append(("Training loss", f"{loss:.4f} nats per token, smoothed over the last steps"))
    if evaluations:
        last = evaluations[-1]
        rows.append(("Held-out text", f"{last.bits_per_byte:.4f} bits per byte after step {last.step:,}, over "
                     f"{last.num_heldout_tokens:,} tokens that the model never saw"))  # fmt: skip
    if config.plan is not None:
        plan = config.plan
        rows.append(("Plan", f"{plan.machine.chip}, {plan.dtype}, {plan.num_micro_batches} × "
                     f"{plan.micro_batch_sequences} sequences a step"))  # fmt: skip
    if command := _command(run):
        rows.append(("Command", f"`{command}`"))
    rows.append(("Weights", "float32, exactly those that were trained" if dtype == "float32" else
                 "bfloat16, rounded from the float32 that were trained"))  # fmt: skip
    lines = [
        *_front_matter(), "", f"# {run.name}", "",
        "A language model trained with Colossus. It continues text; it was not taught to follow instructions or to "
        "refuse anything" + (", beyond what the weights that it started from were." if imported_from else "."),
        "Nobody has looked at how true, safe or useful what it writes is. Find out before you use it for anything.",
        "",
        "| | |", "|---|---|", *(f"| {what} | {_cell(fact)} |" for what, fact in rows), "",
        _opening(run), "",
        *_how_to_load(config), "",
        f"Written by `colossus export` of Colossus {_version()} from step {step:,} of the run `{run.name}`; train it "
        f"on with `colossus import`.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _how_to_load(config: RunConfig) -> list[str]:
    if not architecture_of(config.model).in_transformers:
        return ["```sh", 'vllm serve "this directory"   # transformers has no such architecture', "```"]
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("this directory")',
        'model = AutoModelForCausalLM.from_pretrained("this directory")',
        "```",
    ]


def _opening(run: RunDirectory) -> str:
    if opens_as_it_came(run.tokenizer_path):
        return (
            "The tokenizer's files are those of the model that it started from, unchanged: they put before a text what "
            "that model expects there. In training here, the end-of-text token stood before every document."
        )
    return (
        "In training, the end-of-text token stood before every document. The tokenizer here puts it before every "
        "text, so give a prompt as it is."
    )


def _front_matter() -> list[str]:
    """No license: that is for the owner of the weights and the data to say."""
    return [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- colossus",
        "---",
    ]


def _parameters(config: RunConfig) -> str:
    total, active = config.model.num_params(), config.model.num_active_params()
    each = f", of which a token uses {format_count(active)}" if active != total else ""
    return f"{total:,} ({format_count(total)}){each}"


def _tokens(steps: list[StepDone], config: RunConfig, step: int) -> int:
    """Counted where the log says, computed where it is lost."""
    return steps[-1].tokens if steps else step * config.batch.tokens


def _command(run: RunDirectory) -> str | None:
    """How the run was started, if it says so."""
    try:
        program, *arguments = json.loads((run.path / "environment.json").read_text(encoding="utf-8"))[
            "command"
        ]
        return shlex.join([Path(program).name, *arguments])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _version() -> str:
    try:
        return metadata.version("colossus-llm")
    except metadata.PackageNotFoundError:
        return "(not installed)"
