"""A chip whose curves follow laws that are known exactly."""

from itertools import product
from typing import Any, get_args

from colossus.spec.measured import (
    NEEDED,
    CollectiveKind,
    Measured,
    MeasuredAttention,
    MeasuredCollective,
    MeasuredMatmul,
    MeasuredOperation,
    Product,
)

FLOPS = {"float32": 1e11, "bfloat16": 2e11}
CALL_S, BYTES_PER_S, ELEMENTS_PER_S, LINK_BYTES_PER_S, LATENCY_S = 2e-6, 2e10, 1e9, 5e8, 1e-4
ATTENTION_FLOPS = 5e10
ITEMSIZE = {"float32": 4, "bfloat16": 2}


def matmul_s(dtype: str, tokens: int, outputs: int, inputs: int) -> float:
    moved = ITEMSIZE[dtype] * (tokens * inputs + inputs * outputs + tokens * outputs)
    return 2 * tokens * outputs * inputs / FLOPS[dtype] + moved / BYTES_PER_S + CALL_S


def made_up(**changes: Any) -> Measured:
    sizes = (2**10, 2**16, 2**22)
    shapes = ((128, 128, 128), (1024, 512, 256), (32, 4096, 512), (2048, 768, 768))
    return Measured(
        source="made up",
        num_ranks=2,
        num_threads=1,
        float32_library="default",
        spread=0.01,
        matmuls=tuple(
            MeasuredMatmul(
                dtype=dtype, product=name, tokens=shape[0], outputs=shape[1], inputs=shape[2],
                seconds=matmul_s(dtype, *shape),
            )
            for dtype, name, shape in product(FLOPS, get_args(Product), shapes)
        ),
        attention=tuple(
            MeasuredAttention(
                dtype=dtype, sequence_tokens=sequence, head_dim=head_dim, sizes=(1, 64),
                seconds=tuple(n * 4 * sequence**2 * head_dim / ATTENTION_FLOPS for n in (1, 64)),
                backward_seconds=tuple(n * 10 * sequence**2 * head_dim / ATTENTION_FLOPS for n in (1, 64)),
            )
            for dtype, sequence, head_dim in product(FLOPS, (128, 1024), (32, 128))
        ),
        operations=tuple(
            MeasuredOperation(
                name=name, dtype=dtype, sizes=sizes, seconds=tuple(n / ELEMENTS_PER_S for n in sizes)
            )
            for dtype, name in product(FLOPS, NEEDED)
        ),
        collectives=tuple(
            MeasuredCollective(
                kind=kind, backend="gloo", num_ranks=2, sizes=(1, 2**30),
                seconds=(LATENCY_S, LATENCY_S + 2**30 / LINK_BYTES_PER_S),
            )
            for kind in get_args(CollectiveKind)
        ),
    ).model_copy(update=changes)  # fmt: skip
