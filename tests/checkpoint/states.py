"""States that are functions of the step: what was loaded can be compared with what should have been saved."""

from pathlib import Path

import torch

from colossus.checkpoint import Loaded


def state(step: int, num_elements: int = 2000) -> dict[str, torch.Tensor]:
    """A small training state: several dtypes and payloads, every value depending on the step."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(num_elements // 20, 20, generator=generator)
    return {
        "model.layers.0.mlp.up.weight": weight,
        "model.head.weight": weight.to(torch.bfloat16),
        "optimizer.momentum": torch.randn(num_elements, generator=generator),
        "optimizer.step": torch.tensor(step),
        "rng": torch.randint(0, 256, (16,), generator=generator, dtype=torch.uint8),
    }


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's elements as bytes: equality of bits, NaN and -0 included."""
    return (
        tensor.detach()
        .clone(memory_format=torch.contiguous_format)
        .reshape(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )


def assert_same(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(loaded) == list(expected)
    for name, tensor in expected.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(loaded[name]) == raw(tensor), name


def assert_is_state(loaded: Loaded) -> None:
    """It is, bit for bit, what `state` gives for its step."""
    assert loaded.facts["step"] == loaded.step
    assert_same(loaded.tensors, state(loaded.step, loaded.facts.get("num_elements", 2000)))


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]
