"""What a ModelSpec counts, against brute force and calculations by hand; and what cannot be one."""

from typing import Any

import pytest
from pydantic import ValidationError

from colossus import zoo
from colossus.spec.base import Frozen
from colossus.spec.model import (
    AttentionSpec,
    FirstLayers,
    LatentAttentionSpec,
    LayerNormSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    RopeSpec,
    RouterGroups,
    RouterSpec,
    SharedMlpSpec,
    WindowSpec,
    YarnScaling,
)

GROUPED = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=6)
LATENT = LatentAttentionSpec(
    num_heads=3, q_lora_rank=7, kv_lora_rank=5, nope_head_dim=4, rope_head_dim=2, value_head_dim=3
)
MOE = MoeSpec(
    num_experts=5,
    top_k=2,
    intermediate_size=11,
    bias=True,
    shared=SharedMlpSpec(intermediate_size=13),
    router=RouterSpec(bias=True, balancing_bias=True),
)


def tiny(**changes: Any) -> ModelSpec:
    parts: dict[str, Any] = {
        "name": "tiny",
        "vocab_size": 23,
        "context_tokens": 16,
        "num_layers": 5,
        "hidden_size": 12,
        "attention": GROUPED,
        "mlp": MlpSpec(intermediate_size=20),
    }
    return ModelSpec(**{**parts, **changes})


VARIETIES = {
    "plain": tiny(),
    "gpt": tiny(
        attention=AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=6, rope=None, bias="all"),
        mlp=MlpSpec(intermediate_size=20, activation="gelu", bias=True),
        norm=LayerNormSpec(),
        learned_positions=True,
        tied_embeddings=True,
    ),
    "experts": tiny(mlp=MOE, norm_placement="sandwich"),
    "latent": tiny(attention=LATENT, mlp=MOE, first_layers=FirstLayers(num_layers=2, mlp=MlpSpec(intermediate_size=9))),
    "latent_without_query_rank": tiny(attention=LATENT.model_copy(update={"q_lora_rank": None})),
    "normed": tiny(
        attention=AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True, qk_norm_weights="all_heads"),
        norm_placement="post",
    ),
    "sinks": tiny(attention=GROUPED.model_copy(update={"sinks": True, "bias": "qkv"})),
}  # fmt: skip
every_variety = pytest.mark.parametrize("spec", VARIETIES.values(), ids=VARIETIES)


# --- the table and its sums ---


@every_variety
def test_counts_are_sums_over_the_spelled_out_table(spec: ModelSpec) -> None:
    table = spec.parameters()
    assert len({parameter.name for parameter in table}) == len(table)
    assert spec.num_params() == sum(parameter.num_elements for parameter in table)
    active = matmul = 0
    for parameter in table:
        used = parameter.num_elements
        if parameter.expert:
            assert parameter.shape[0] == MOE.num_experts
            used = MOE.top_k * parameter.num_elements // MOE.num_experts
        active += used
        matmul += used if parameter.role in ("matrix", "head") else 0
    assert spec.num_active_params() == active
    assert spec.num_matmul_params() == matmul + (23 * 12 if spec.tied_embeddings else 0)


@every_variety
def test_groups_of_layers_make_up_the_table(spec: ModelSpec) -> None:
    layers = [
        (f"layers.{i}.{parameter.name}", parameter.shape)
        for group in spec.layer_groups()
        for i in range(group.first_layer, group.first_layer + group.num_layers)
        for parameter in group.parameters
    ]
    outside = [(p.name, p.shape) for p in (*spec.input_parameters(), *spec.output_parameters())]
    assert sorted(layers + outside) == sorted((p.name, p.shape) for p in spec.parameters())
    for group in spec.layer_groups():
        for i in range(group.first_layer, group.first_layer + group.num_layers):
            assert spec.mlp_of(i) == group.mlp


def test_counting_does_not_spell_out_the_layers() -> None:
    layers = 2**40
    per_layer = (tiny().num_params() - tiny(num_layers=1).num_params()) // 4
    assert tiny(num_layers=layers).num_params() == tiny(num_layers=1).num_params() + (layers - 1) * per_layer
    assert sum(len(group.parameters) for group in zoo.find("kimi-k2").layer_groups()) < 40


def test_a_latent_layer_by_hand() -> None:
    group = tiny(attention=LATENT, zero_init_outputs=False).layer_groups()[0]
    shapes = {p.name: p.shape for p in group.parameters if p.name.startswith("attention.")}
    assert shapes == {
        "attention.query_down.weight": (7, 12),
        "attention.query_norm.weight": (7,),
        "attention.query_up.weight": (3 * (4 + 2), 7),
        "attention.key_value_down.weight": (5 + 2, 12),
        "attention.key_value_norm.weight": (5,),
        "attention.key_value_up.weight": (3 * (4 + 3), 5),
        "attention.output.weight": (12, 3 * 3),
    }


def test_experts_by_hand() -> None:
    group = VARIETIES["experts"].layer_groups()[0]
    table = {p.name: p for p in group.parameters if p.name.startswith("mlp.")}
    assert {name: p.shape for name, p in table.items()} == {
        "mlp.balance": (5,),
        "mlp.router.weight": (5, 12),
        "mlp.router.bias": (5,),
        "mlp.experts.gate.weight": (5, 11, 12),
        "mlp.experts.gate.bias": (5, 11),
        "mlp.experts.up.weight": (5, 11, 12),
        "mlp.experts.up.bias": (5, 11),
        "mlp.experts.down.weight": (5, 12, 11),
        "mlp.experts.down.bias": (5, 12),
        "mlp.shared.gate.weight": (13, 12),
        "mlp.shared.gate.bias": (13,),
        "mlp.shared.up.weight": (13, 12),
        "mlp.shared.up.bias": (13,),
        "mlp.shared.down.weight": (12, 13),
        "mlp.shared.down.bias": (12,),
    }
    assert {name for name, p in table.items() if p.expert} == {n for n in table if ".experts." in n}
    assert table["mlp.balance"].role == "balance"


# --- FLOPs and caches ---


@pytest.mark.parametrize("full_every", [None, 2, 3, 9])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 17])
def test_pairs_and_cache_under_a_window(full_every: int | None, tokens: int) -> None:
    window = WindowSpec(tokens=4, full_every=full_every)
    spec = tiny(attention=GROUPED.model_copy(update={"window": window}))
    pairs = cached = 0
    for layer in range(spec.num_layers):
        reach = 4 if window.in_layer(layer) else tokens
        pairs += sum(1 for query in range(tokens) for key in range(query + 1) if query - key < reach)
        cached += min(tokens, reach)
    assert spec.attention_pairs(tokens) == pairs
    assert spec.kv_cache_bytes(tokens, "bfloat16") == cached * 2 * (2 * 6) * 2
    attention_flops = 3 * 4 * (4 * 6) * pairs
    assert tokens * spec.flops_per_token(tokens) == pytest.approx(
        6 * tokens * spec.num_matmul_params() + attention_flops, rel=1e-12
    )


def test_the_window_is_on_layers_but_every_so_many_th() -> None:
    window = WindowSpec(tokens=4, full_every=4)
    assert [window.in_layer(i) for i in range(8)] == [True, True, True, False] * 2
    assert window.num_window_layers(8) == 6
    assert window.num_window_layers(7) == 6


def test_flops_of_a_dense_model_by_hand() -> None:
    """Llama 3 8B on 8,192 tokens."""
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336
    weights = 32 * layer + 128_256 * 4096
    attention = 32 * 12 * 4096 * 8193 / 2  # 6 · 2 products · width · mean keys
    assert zoo.find("llama3-8b").flops_per_token(8192) == 6 * weights + attention


def test_flops_of_a_mixture_of_experts_by_hand() -> None:
    """Grok-2 on 4,096 tokens: 2 of 8 experts and the dense MLP beside them."""
    attention = 2 * 8192 * 8192 + 2 * 8192 * 1024
    feed_forward = 8 * 8192 + 2 * 3 * 8192 * 16_384 + 3 * 8192 * 32_768
    weights = 64 * (attention + feed_forward) + 131_072 * 8192
    assert zoo.find("grok-2").flops_per_token(4096) == 6 * weights + 64 * 12 * 8192 * 4097 / 2


def test_flops_of_latent_attention_by_hand() -> None:
    """DeepSeek-V3 on 4,096 tokens: 3 dense layers, 58 with 8 of 256 experts and a shared one."""
    attention = (
        7168 * 1536 + 1536 * 128 * 192  # queries
        + 7168 * (512 + 64) + 512 * 128 * (128 + 128)  # keys and values
        + 128 * 128 * 7168
    )  # fmt: skip
    dense, sparse = 3 * 7168 * 18_432, 256 * 7168 + 9 * 3 * 7168 * 2048
    weights = 61 * attention + 3 * dense + 58 * sparse + 129_280 * 7168
    scores = 61 * 3 * 2 * 128 * (192 + 128) * 4097 / 2
    assert zoo.find("deepseek-v3").flops_per_token(4096) == 6 * weights + scores


def test_flops_of_windows_by_hand() -> None:
    """gpt-oss-20b on 4,096 tokens: 12 of its 24 layers see 128 tokens; on 128 tokens all see all."""
    spec = zoo.find("gpt-oss-20b")
    windowed = 128 * 129 // 2 + (4096 - 128) * 128
    pairs = 12 * (4096 * 4097 // 2 + windowed)
    assert spec.flops_per_token(4096) == 6 * spec.num_matmul_params() + 12 * 64 * 64 * pairs / 4096
    full = 24 * 12 * 64 * 64 * 129 / 2
    assert spec.flops_per_token(128) == 6 * spec.num_matmul_params() + full


def test_what_generation_keeps() -> None:
    """DeepSeek-V3 keeps 512 + 64 numbers a layer, Llama 3.1 405B 2 × 8 × 128 (516 KB and 70 KB a token in
    bfloat16, arXiv:2412.19437 and arXiv:2505.09343 table 1)."""
    assert zoo.find("deepseek-v3").kv_cache_bytes_per_token("bfloat16") == 70_272
    assert zoo.find("llama3.1-405b").kv_cache_bytes_per_token("bfloat16") == 516_096
    assert zoo.find("deepseek-v3").kv_cache_bytes(1000, "bfloat16") == 70_272_000


# --- what cannot be ---


@pytest.mark.parametrize(
    ("kind", "values", "sentence"),
    [
        (MoeSpec, {"num_experts": 4, "top_k": 5, "intermediate_size": 8}, "top_k 5 is more than num_experts 4"),
        (MoeSpec, {"num_experts": 6, "top_k": 2, "intermediate_size": 8,
                   "router": RouterSpec(groups=RouterGroups(num_groups=4, top_groups=2))}, "not a multiple of"),
        (RouterGroups, {"num_groups": 2, "top_groups": 3}, "top_groups 3 is more than num_groups 2"),
        (LatentAttentionSpec, {**LATENT.model_dump(), "rope_head_dim": 3}, "rope_head_dim 3 is odd"),
        (AttentionSpec, {**GROUPED.model_dump(), "qk_norm_weights": "head"}, "qk_norm is false"),
        (AttentionSpec, {**GROUPED.model_dump(), "rope": RopeSpec(rotated_fraction=0.5)}, "not an even number"),
        (WindowSpec, {"tokens": 4, "full_every": 1}, "greater than or equal to 2"),
        (YarnScaling, {"factor": 0.5, "original_context_tokens": 8}, "greater than or equal to 1"),
    ],
)  # fmt: skip
def test_impossible_parts(kind: type[Frozen], values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        kind(**values)
    assert sentence in str(caught.value)


def test_first_layers_leave_one_for_the_rest() -> None:
    mlp = MlpSpec(intermediate_size=9)
    tiny(first_layers=FirstLayers(num_layers=4, mlp=mlp))
    with pytest.raises(ValidationError, match=r"first_layers\.num_layers is 5, but num_layers is 5"):
        tiny(first_layers=FirstLayers(num_layers=5, mlp=mlp))
