"""Every model of the zoo has its published size.

Exact totals are those of the published weights: Grok's, Llama 3.1's, GPT-2's, Mixtral's, Qwen3 30B-A3B's and
DeepSeek-V3's as their weight files sum up; the others as recalled from the model pages.
"""

import pytest

from colossus import zoo

TOTALS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "dbrx": 131_596_523_520,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "deepseek-v3": 671_026_419_200,
    "grok-1": 315_684_820_992,
    "grok-2": 269_515_497_472,
}

ROUNDED = {
    "gpt3-6.7b": 6.7e9,
    "gpt3-13b": 12.85e9,
    "gpt3-22b": 22e9,
    "gpt3-175b": 174.6e9,
    "gpt3-530b": 529.6e9,
    "gpt3-1t": 1008e9,
    "olmo2-7b": 7.3e9,
    "olmo2-13b": 13.72e9,
    "olmo2-32b": 32.23e9,
    "nemotron4-15b": 15.6e9,
    "nemotron4-340b": 341e9,
    "kimi-k2": 1026.4e9,
}

ACTIVE = {
    "mixtral-8x7b": 12.88e9,
    "mixtral-8x22b": 39.16e9,
    "dbrx": 36.47e9,
    "qwen3-30b-a3b": 3.353e9,
    "qwen3-235b-a22b": 22.19e9,
    "deepseek-v3": 37.55e9,
    "kimi-k2": 32.86e9,
    "grok-1": 83.76e9,
    "grok-2": 114.9e9,
    "gpt-oss-20b": 3.61e9 + 0.579e9,  # the published 3.6 and 5.1 billion leave out the embeddings
    "gpt-oss-120b": 5.13e9 + 0.579e9,
}


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_exact_totals(name: str, total: int) -> None:
    assert zoo.find(name).num_params() == total


@pytest.mark.parametrize(("name", "total"), ROUNDED.items())
def test_rounded_totals(name: str, total: float) -> None:
    assert zoo.find(name).num_params() == pytest.approx(total, rel=0.007)


def test_every_published_model_is_checked() -> None:
    ours = {name for name in zoo.names() if zoo.family(name) == "ladder"}
    assert TOTALS.keys() | ROUNDED.keys() == set(zoo.names()) - ours


@pytest.mark.parametrize(("name", "active"), ACTIVE.items())
def test_active_parameters(name: str, active: float) -> None:
    assert zoo.find(name).num_active_params() == pytest.approx(active, rel=0.001)


def test_all_mixtures_are_checked_and_all_others_are_active_as_a_whole() -> None:
    for name in zoo.names():
        model = zoo.find(name)
        assert (model.num_active_params() < model.num_params()) == (name in ACTIVE), name


def test_grok_1_is_a_quarter_active() -> None:
    """xAI: "25% of the weights active on a given token"; two of eight experts, and what all tokens share."""
    model = zoo.find("grok-1")
    experts = 64 * 8 * 3 * 6144 * 32_768
    assert model.num_params() - model.num_active_params() == experts * 6 // 8
