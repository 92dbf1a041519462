"""What cannot be combined is refused in one sentence, with what would work."""

from typing import Any

import pytest

from colossus.errors import ConfigError
from colossus.spec.compose import check_job
from colossus.spec.model import ModelSpec
from tests.parallel.layouts import DEEPSEEK_LIKE, GPT_LIKE, dense, job, mixture

REFUSED: dict[str, tuple[ModelSpec, dict[str, Any], str]] = {
    "heads": (dense(), {"tp": 8}, r"tp 8 does not divide the heads of dense, 4; tp 4 does"),
    "inner channels": (
        dense(attention=dense().attention.model_copy(update={"num_heads": 5, "num_kv_heads": 5})),
        {"tp": 5},
        r"tp 5 does not divide the inner channels of the MLP of dense, 48; tp 4 does",
    ),
    "tokens": (
        dense(),
        {"tp": 4, "sequence_tokens": 30},
        r"sequences of 30 tokens are not cut evenly .* 28 tokens",
    ),
    "exchange": (dense(), {"cp": 2}, "context_exchange says not how"),
    "all-to-all": (dense(), {"cp": 8, "context_exchange": "all-to-all"}, "'all-to-all' trades .* cp 4"),
    "experts of none": (dense(), {"shard": 2, "ep": 2}, "dense has no experts"),
    "experts": (mixture(), {"shard": 3, "ep": 3}, r"ep 3 does not divide the 8 experts of mixture; 2 does"),
    "shared experts": (mixture(), {"tp": 4, "expert_tp": 2}, "expert_tp is 2: it can be 1 or tp, 4"),
    "folding": (mixture(), {"shard": 2, "ep": 4}, "does not divide shard × cp × tp, 2 ranks"),
    "tied": (
        GPT_LIKE,
        {"pp": 2, "schedule": "zbv", "virtual_stages": 2},
        "ties its head to its embedding, and zbv would have both",
    ),
    "precision": (
        dense(),
        {"precision": "nvfp4"},
        "nvfp4 are not built yet; plan with --fix precision=bfloat16",
    ),
    "layers": (dense(), {"pp": 2, "stage_layers": (2, 3)}, "stage_layers has 5 layers, and dense has 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str) -> None:
    model, settings, sentence = REFUSED[name]
    with pytest.raises(ConfigError, match=sentence):
        check_job(model, job(model, **settings))


def test_compiled_layers_do_not_put_weight_gradients_off() -> None:
    model = dense()
    check_job(model, job(model, pp=2, schedule="zb-h1"))
    with pytest.raises(ConfigError, match=r"zb-h1 puts weight gradients off.* fixed\.compile=false"):
        check_job(model, job(model, pp=2, schedule="zb-h1"), compiled=True)


def test_what_can_be_is_not() -> None:
    check_job(DEEPSEEK_LIKE, job(DEEPSEEK_LIKE, shard=2, tp=2, ep=4, sharding="weights", precision="fp8"))
