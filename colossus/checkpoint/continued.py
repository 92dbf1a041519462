"""How training goes on from weights that are there already, unless told otherwise."""

from collections.abc import Sequence

from colossus.spec.config import override
from colossus.spec.data import DataConfig, LoadedTokenizer
from colossus.spec.model import ModelSpec
from colossus.spec.run import AdamW, Batch, Cosine, RunConfig

SEQUENCE_TOKENS = 1024
WARMUP_SHARE = 0.1
WARMUP_STEPS = 50


def continued(model: ModelSpec) -> RunConfig:
    """The settings that `colossus import` and `colossus upcycle` start from; `with_warmup` fits them to the budget."""
    return RunConfig(
        name=model.name,
        model=model,
        data=DataConfig(
            tokenizer=LoadedTokenizer(path="tokenizer.json")
        ),  # the run's own copy, once it has one
        batch=Batch(sequences=8, sequence_tokens=min(SEQUENCE_TOKENS, model.context_tokens)),
        # AdamW, as published models were trained with it: Muon's orthogonal updates have the same size in every
        # direction and move such weights far at once. A tenth to a thirtieth of the usual peak, as what the weights
        # know is lost before what is new is learned.
        optimizer=AdamW(learning_rate=1e-4),
        # Up from zero, because Adam's second moments are empty and its first steps are as large as they can be.
        schedule=Cosine(warmup_steps=WARMUP_STEPS, final_scale=0.1),
    )


def settled(start: RunConfig, changes: Sequence[str]) -> RunConfig:
    """`start` with settings changed, in the manner of `--set`. Warm-up follows from the budget; what `changes` says
    of it has the last word."""
    return override(with_warmup(override(start, changes)), changes)


def with_warmup(config: RunConfig) -> RunConfig:
    """A tenth of the run for warm-up, where the budget says how many steps it has."""
    total = config.total_steps()
    if total is None:
        return config
    schedule = config.schedule.model_copy(update={"warmup_steps": max(1, round(WARMUP_SHARE * total))})
    return config.model_copy(update={"schedule": schedule})
