"""Do the files hold the model that config.json describes? Every tensor's source, or sentences on what does not fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from colossus.checkpoint.hugging_face.header import Span
from colossus.checkpoint.hugging_face.sources import FP8, BlockFp8, Joined, Mxfp4, Plain, Source
from colossus.errors import CheckpointError, ConfigError
from colossus.spec.model import ModelSpec
from colossus.units import format_bytes, format_count
from colossus.zoo.hugging_face import Architecture, StoredTensor, quantization_in

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What weights may be stored as: all of these are a float32 exactly."""

_SHOWN = 3
_MOST_MISSING = 1000
_COMPARE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Dequantiser:
    """How stored tensors are quantised, if they are."""

    method: str | None = None
    block: tuple[int, int] = (128, 128)

    @classmethod
    def of(cls, config: Mapping[str, Any], path: Path) -> "Dequantiser":
        method = quantization_in(config)
        if method in (None, "mxfp4"):
            return cls(method)
        if method != "fp8":
            raise ConfigError(
                f"the weights in {path} are quantised by {method!r}; Colossus reads fp8 in blocks, mxfp4, and "
                f"weights that are not quantised. Get a bfloat16 version of the model"
            )
        block = config["quantization_config"].get("weight_block_size")
        if not isinstance(block, list) or len(block) != 2 or not all(type(b) is int and b > 0 for b in block):
            raise ConfigError(
                f"the weights in {path} are fp8 with weight_block_size {block!r}; Colossus reads fp8 with a factor "
                f"for each block, like [128, 128]. Get a bfloat16 version of the model"
            )
        return cls(method, (block[0], block[1]))

    def source(self, tensor: StoredTensor, spans: Mapping[str, tuple[Span, ...]]) -> Source | None:
        """Where a tensor comes from; None if it is nowhere."""
        found = spans.get(tensor.name)
        if self.method == "mxfp4" and found is None:
            blocks, scales = spans.get(f"{tensor.name}_blocks"), spans.get(f"{tensor.name}_scales")
            return Mxfp4(blocks[0], scales[0]) if blocks and scales else None
        if found is None:
            return None
        scale = spans.get(f"{tensor.name}_scale_inv")
        if self.method == "fp8" and scale and found[0].dtype in FP8:
            return BlockFp8(found[0], scale[0], self.block)
        return _joined(found, tensor.shape)


def _joined(parts: tuple[Span, ...], shape: tuple[int, ...]) -> Source:
    """One part, or the ranks' parts along the dim that is short by their number.

    Where that cannot be, the first rank's part: its shape will be named.
    """
    num_parts = len(parts)
    if num_parts > 1 and len(shape) == len(parts[0].shape):
        short = [dim for dim, size in enumerate(parts[0].shape) if size != shape[dim]]
        if len(short) == 1 and parts[0].shape[short[0]] * num_parts == shape[short[0]]:
            return Joined(parts, short[0])
    return Plain(parts[0])


def match(
    path: Path,
    architecture: Architecture,
    model: ModelSpec,
    spans: Mapping[str, tuple[Span, ...]],
    dequantise: Dequantiser,
) -> tuple[tuple[StoredTensor, ...], dict[str, Source]]:
    """Every tensor of the model and its source. Raises CheckpointError naming what does not fit."""
    tensors, sources = [], {}
    missing, misshapen, unreadable = [], [], []
    used: set[str] = set()
    for tensor in architecture.tensors(model):
        source = dequantise.source(tensor, spans)
        if source is None:
            missing.append(tensor.name)
            if len(missing) == _MOST_MISSING:  # a config.json may describe any number of layers
                break
            continue
        used.update(architecture.canonical(span.name) for span in source.spans)
        if source.shape != tensor.shape:
            misshapen.append(
                f"{tensor.name} is {list(tensor.shape)} by config.json and {list(source.shape)} in the file"
            )
        elif problem := _problem(tensor, source):
            unreadable.append(problem)
        tensors.append(tensor)
        sources[tensor.name] = source
    extra = [name for name in spans if name not in used and not architecture.ignored(name, model)]
    if len(missing) == _MOST_MISSING:
        extra = []  # the table was not gone through to its end
    problems = [
        *_listed(missing, "is missing", "are missing"),
        *_listed(misshapen, "has another shape", "have another shape"),
        *_listed(unreadable, "cannot be read", "cannot be read"),
        *_listed(extra, "is not of this model", "are not of this model"),
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not hold the model that its config.json describes: {'; '.join(problems)}. Get the "
            f"directory again, or mend config.json"
        )
    return tuple(tensors), sources


def _listed(names: list[str], one: str, several: str) -> list[str]:
    if not names:
        return []
    count = f"{len(names):,}" if len(names) < _MOST_MISSING else f"at least {_MOST_MISSING:,}"
    what = f"1 tensor {one}" if len(names) == 1 else f"{count} tensors {several}"
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return [f"{what} ({', '.join(names[:_SHOWN])}{more})"]


def _problem(tensor: StoredTensor, source: Source) -> str | None:
    """What hinders a tensor of the right shape from being read."""
    if isinstance(source, BlockFp8):
        if len(source.shape) != 2 or source.scale.shape != source.scale_shape:
            return (
                f"the scales of {tensor.name} are {list(source.scale.shape)}, not {list(source.scale_shape)}"
            )
    elif isinstance(source, Mxfp4):
        shape = source.blocks.shape
        if len(shape) != 4 or shape[-1] != 16 or source.scales.shape != shape[:-1]:
            return f"{tensor.name} has blocks {list(shape)} and scales {list(source.scales.shape)}"
        if {source.blocks.dtype, source.scales.dtype} != {torch.uint8}:
            return f"the blocks and scales of {tensor.name} are not U8"
    elif (dtype := source.spans[0].dtype) not in _DTYPES:
        return f"{tensor.name} is {str(dtype).removeprefix('torch.')} and has no scales to read it with"
    return None


def check_size(path: Path, model: ModelSpec, spans: Mapping[str, tuple[Span, ...]]) -> None:
    """A config.json can describe a model whose mere table takes all memory; the files say how large it can be."""
    parts = [part for several in spans.values() for part in several]
    num_bytes = sum(part.num_bytes for part in parts)
    if model.num_params() > 32 * num_bytes + 1_000_000:
        raise CheckpointError(
            f"{path}/config.json describes a model of {format_count(model.num_params())} parameters "
            f"({model.num_layers:,} layers, {model.hidden_size:,} wide, vocabulary {model.vocab_size:,}), and the "
            f"files hold {len(spans):,} tensors of {format_bytes(num_bytes)} in all{_largest(parts)}. Get the "
            f"directory again, or mend config.json"
        )


def _largest(parts: list[Span]) -> str:
    if not parts:
        return ""
    largest = max(parts, key=lambda part: part.num_bytes)
    return f", the largest {largest.name} {list(largest.shape)}"


def check_tied(path: Path, tensors: Sequence[StoredTensor], spans: Mapping[str, tuple[Span, ...]]) -> None:
    """A tied head that is stored all the same must be the embedding: else config.json is wrong, and what the model
    computes would be, too. Raises CheckpointError."""
    (head, *_) = spans.get("lm_head.weight", (None,))
    name = next((one.name for one in tensors if one.parts[0].parameter == "embedding.weight"), None)
    (embedding, *_) = spans.get(name or "", (None,))
    if head is None or embedding is None or any(one.name == "lm_head.weight" for one in tensors):
        return
    if not _same(head, embedding):
        raise CheckpointError(
            f"{path} has a lm_head.weight that is not {name}, and config.json says that they are one "
            f"(tie_word_embeddings). Set tie_word_embeddings to false there, or take lm_head.weight away"
        )


def _same(one: Span, other: Span) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        left = one.num_bytes
        while left:
            count = min(left, _COMPARE_BYTES)
            if first.read(count) != second.read(count):
                return False
            left -= count
    return True
