"""Which models can be trained with their sequences split, and how. No torch."""

from colossus.errors import ConfigError
from colossus.spec.model import ModelSpec
from colossus.spec.plan import ContextExchange


def check_exchange(model: ModelSpec, exchange: ContextExchange, cp: int, tp: int = 1) -> None:
    """Raises ConfigError where `cp` ranks cannot see each other's keys and values in this way.

    Rings and gathers ask nothing of a model. All-to-all deals out the heads that a tensor-parallel rank has; keys and
    values that several heads share are repeated where there are too few of them.
    """
    if cp == 1 or exchange != "all-to-all":
        return
    heads = model.attention.num_heads // tp
    if heads % cp != 0:
        fitting = max(n for n in range(1, min(heads, cp) + 1) if heads % n == 0)
        raise ConfigError(
            f"context exchange 'all-to-all' trades parts of the sequence for heads: {model.name} has {heads} heads on "
            f"each rank (tp {tp}), which cp {cp} does not divide. 'ring' and 'all-gather' would do, or cp {fitting}"
        )
