"""gpt-oss: experts with biases, windows of 128 tokens on every other layer, attention sinks."""

from functools import partial

from colossus.spec.model import (
    AttentionSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RopeSpec,
    RouterSpec,
    WindowSpec,
    YarnScaling,
)
from colossus.zoo.entry import Entry


def gpt_oss(name: str, num_layers: int, num_experts: int) -> ModelSpec:
    scaling = YarnScaling(factor=32.0, original_context_tokens=4096, whole_channels=False)
    return ModelSpec(
        name=name,
        vocab_size=201_088,
        context_tokens=131_072,
        num_layers=num_layers,
        hidden_size=2880,
        attention=AttentionSpec(
            num_heads=64,
            num_kv_heads=8,
            head_dim=64,
            rope=RopeSpec(base=150_000.0, scaling=scaling),
            window=WindowSpec(tokens=128, full_every=2),
            sinks=True,
            bias="all",
        ),
        mlp=MoeSpec(
            num_experts=num_experts,
            top_k=4,
            intermediate_size=2880,
            activation="clamped_swiglu",
            bias=True,
            router=RouterSpec(bias=True),
        ),
        norm=NormSpec(epsilon=1e-5),
        zero_init_outputs=False,
    )


_SOURCE = "openai/gpt-oss gpt_oss/torch/model.py"
ENTRIES = {
    "gpt-oss-20b": Entry(
        "gpt-oss", _SOURCE + "; 24 layers of 32 experts: recall", partial(gpt_oss, "gpt-oss-20b", 24, 32)
    ),
    "gpt-oss-120b": Entry("gpt-oss", _SOURCE, partial(gpt_oss, "gpt-oss-120b", 36, 128)),
}
