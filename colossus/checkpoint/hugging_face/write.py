"""A model into a Hugging Face directory, tensor by tensor: memory holds one, however large model and shards are."""

import json
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colossus.checkpoint.hugging_face.convert import stored
from colossus.checkpoint.hugging_face.new_directory import check_free, new_directory, write_synced
from colossus.checkpoint.hugging_face.read import check_finite
from colossus.checkpoint.hugging_face.tokenizer_files import generation_config, write_tokenizer
from colossus.checkpoint.hugging_face.weight_files import INDEX_NAME, SINGLE_NAME
from colossus.checkpoint.payload import CHUNK_BYTES, TensorType, lay_out_file, write_payload
from colossus.data.progress import Progress, SilentProgress
from colossus.errors import ConfigError
from colossus.spec.model import Dtype, ModelSpec
from colossus.zoo.hugging_face import Architecture, StoredTensor, architecture_of

SHARD_BYTES = 5_000_000_000
"""What a file has at the most, if no single tensor is larger; the size that `transformers` long used."""

_DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Written:
    """A directory that is on the disk. `num_bytes` are those of the weights."""

    path: Path
    architecture: str
    num_tensors: int
    num_bytes: int
    num_files: int


def write_directory(
    model: ModelSpec,
    parameter: Callable[[str], Tensor],
    directory: Path | str,
    *,
    dtype: Dtype = "float32",
    max_shard_bytes: int = SHARD_BYTES,
    tokenizer: Path | None = None,
    card: str | None = None,
    one_of: Callable[[str, int], Tensor] | None = None,
    release: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
) -> Written:
    """Write a model for `transformers`, vLLM and others; returns when it would survive a power cut.

    `parameter` gives a parameter's values by its name in `model.parameters()`, and `one_of` those of one expert, if
    that is cheaper than taking them from all experts'; `release` is called when those given so far are not needed any
    more. `tokenizer` is a folder with a tokenizer, and what came with it. float32 is
    exact; in bfloat16 only the bias that balances experts stays float32, as small steps move it.

    Raises ConfigError if no architecture holds the model or `directory` is not empty, CheckpointError if it cannot
    be written or a weight is not finite: nothing is left of it then.
    """
    architecture = architecture_of(model)
    directory = Path(directory)
    check_free(directory)
    shards = _shards(model, architecture, dtype, max_shard_bytes)
    num_bytes = sum(kind.num_bytes for shard in shards for _, kind in shard)
    progress = progress or SilentProgress()
    progress.stage(f"writing {directory}", num_bytes)
    with new_directory(directory) as target:
        _write_shards(target, shards, parameter, one_of, release, progress)
        ids: dict[str, Any] = {}
        if tokenizer is not None:
            ids = write_tokenizer(target, tokenizer, model.context_tokens)
        # Two names of one field: `dtype` since transformers 5, `torch_dtype` before it and in vLLM.
        config = {**architecture.write(model), **ids, "dtype": dtype, "torch_dtype": dtype}
        _write_json(target / "config.json", config)
        _write_json(target / "generation_config.json", generation_config(ids, tokenizer))
        if card is not None:
            write_synced(target / "README.md", card)
    return Written(directory, architecture.name, sum(map(len, shards)), num_bytes, len(shards))


_Shard = Sequence[tuple[StoredTensor, TensorType]]


def _shards(model: ModelSpec, architecture: Architecture, dtype: Dtype, max_bytes: int) -> list[_Shard]:
    """Tensors in the architecture's order, cut into files of at most `max_bytes` where no tensor is larger."""
    if max_bytes < 1:
        raise ConfigError(f"a shard of {max_bytes} bytes cannot hold anything; give 1 or more")
    balance = {parameter.name for parameter in model.parameters() if parameter.role == "balance"}
    shards: list[list[tuple[StoredTensor, TensorType]]] = [[]]
    filled = 0
    for tensor in architecture.tensors(model):
        stays_float32 = all(part.parameter in balance for part in tensor.parts)
        kind = TensorType(torch.float32 if stays_float32 else _DTYPES[dtype], tensor.shape)
        if shards[-1] and filled + kind.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((tensor, kind))
        filled += kind.num_bytes
    return shards


def _write_shards(
    target: Path,
    shards: Sequence[_Shard],
    parameter: Callable[[str], Tensor],
    one_of: Callable[[str, int], Tensor] | None,
    release: Callable[[], None],
    progress: Progress,
) -> None:
    buffer = mmap.mmap(-1, CHUNK_BYTES)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        by_name = {tensor.name: (tensor, kind) for tensor, kind in shard}

        def make(name: str, by_name: dict[str, tuple[StoredTensor, TensorType]] = by_name) -> Tensor:
            release()
            tensor, kind = by_name[name]
            data = stored(tensor, parameter, dtype=kind.dtype, one_of=one_of)
            check_finite(name, data, "this model")
            progress.advance(kind.num_bytes)
            return data

        single = len(shards) == 1
        file_name = SINGLE_NAME if single else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        layout = lay_out_file({name: kind for name, (_, kind) in by_name.items()})
        write_payload(target / file_name, layout, make, buffer)
        weight_map |= dict.fromkeys(by_name, file_name)
    release()
    if len(shards) > 1:
        total = sum(kind.num_bytes for shard in shards for _, kind in shard)
        _write_json(target / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, record: dict[str, Any]) -> None:
    write_synced(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
