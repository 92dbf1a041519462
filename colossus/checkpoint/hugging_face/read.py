"""A Hugging Face directory, looked through before anything of it is read, then read tensor by tensor.

directory = open_directory(Path("Llama-3.2-1B"))
for name, tensor in directory.parameters():     # ours, in the order of directory.model.parameters()
    ...
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colossus.checkpoint.hugging_face.convert import fill
from colossus.checkpoint.hugging_face.match import Dequantiser, check_size, check_tied, match
from colossus.checkpoint.hugging_face.sources import Source
from colossus.checkpoint.hugging_face.weight_files import inside, read_text, spans_of
from colossus.errors import CheckpointError, ConfigError
from colossus.spec.model import ModelSpec
from colossus.zoo.hugging_face import (
    Architecture,
    StoredTensor,
    architecture_in,
    model_of,
    read_config,
)

_CHECK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory that holds all of a model, as far as can be seen without reading the weights."""

    path: Path
    config: Mapping[str, Any]
    architecture: Architecture
    model: ModelSpec
    tensors: tuple[StoredTensor, ...]
    sources: Mapping[str, Source]
    """Where each stored tensor's values come from."""
    tokenizer: Path | None
    """A `tokenizer.json` or SentencePiece `tokenizer.model`."""
    chat_template: str | None
    """In Jinja, as the directory has it. It is someone else's program: only for a sandboxed environment."""

    @property
    def num_bytes(self) -> int:
        """Of all weights, as stored."""
        return sum(span.num_bytes for source in self.sources.values() for span in source.spans)

    def read(self, tensor: StoredTensor) -> Tensor:
        """A stored tensor's values, in the dtype of the file where it is not quantised.

        Raises CheckpointError naming one that is not finite in every element, or cannot be read.
        """
        data = self.sources[tensor.name].read()
        check_finite(tensor.name, data, str(self.path))
        return data

    def parameters(self, dtype: torch.dtype | None = torch.float32) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of the model with its values, one at a time; None: each in the dtype of its file.

        Takes the memory of one parameter and one stored tensor. Raises CheckpointError as `read` does.
        """
        feeding: dict[str, list[StoredTensor]] = {}
        for tensor in self.tensors:
            for part in tensor.parts:
                whose = feeding.setdefault(part.parameter, [])
                if not whose or whose[-1] is not tensor:
                    whose.append(tensor)
        last: tuple[str, Tensor] | None = None  # a tensor of several parameters is read once for neighbours
        for parameter in self.model.parameters():
            whole: Tensor | None = None
            num_elements = 0
            for tensor in feeding.get(parameter.name, ()):
                if last is None or last[0] != tensor.name:
                    last = None  # let go before the next is read
                    last = (tensor.name, self.read(tensor))
                if whole is None:
                    whole = torch.empty(parameter.shape, dtype=dtype or last[1].dtype)
                num_elements += fill(tensor, last[1], {parameter.name: whole})
                if len(tensor.parts) == 1:
                    last = None
            if whole is None or num_elements != parameter.num_elements:
                raise CheckpointError(
                    f"{self.architecture.name} stores {num_elements:,} of the {parameter.num_elements:,} elements "
                    f"of {parameter.name}"
                )
            yield parameter.name, whole


def open_directory(path: Path | str, *, name: str | None = None) -> Directory:
    """Looks through a Hugging Face directory; the model is called `name`, or as the directory.

    Raises ConfigError where config.json is missing or wrong or describes what Colossus does not know, and
    CheckpointError where the files are damaged, unsafe to open, or do not hold the model that it describes.
    """
    path = Path(path)
    if path.is_file():
        raise ConfigError(
            f"{path} is a file; give the directory that holds config.json and .safetensors files"
        )
    if not path.is_dir():
        raise ConfigError(
            f"there is no directory {path}; give one that holds config.json and .safetensors files"
        )
    if inside(path, "config.json") is None:
        raise ConfigError(f"{path} has no config.json, so it is not a Hugging Face model directory")
    config = read_config(path)
    architecture = architecture_in(config)
    model = model_of(config, name or path.resolve().name)
    dequantise = Dequantiser.of(config, path)
    spans = spans_of(path, architecture)
    check_size(path, model, spans)
    tensors, sources = match(path, architecture, model, spans, dequantise)
    check_tied(path, tensors, spans)
    return Directory(
        path, config, architecture, model, tensors, sources, _tokenizer(path), _chat_template(path)
    )


def check_finite(name: str, tensor: Tensor, where: str) -> None:
    """Raises CheckpointError if an element is not finite. Takes a megabyte, not another tensor."""
    # Through a view with neighbours in memory side by side, so that cutting it up copies nothing.
    flat = tensor.permute(sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))).reshape(-1)
    for chunk in flat.split(_CHECK_ELEMENTS):
        if not bool(torch.isfinite(chunk).all()):
            num_bad = sum(int((~torch.isfinite(one)).sum()) for one in flat.split(_CHECK_ELEMENTS))
            raise CheckpointError(
                f"{name} in {where} has {num_bad:,} elements of {flat.numel():,} that are not finite as "
                f"{str(tensor.dtype).removeprefix('torch.')}; a model with them computes nothing"
            )


# --- tokenizer and chat template ---


def _tokenizer(path: Path) -> Path | None:
    return inside(path, "tokenizer.json") or inside(path, "tokenizer.model")


def _chat_template(path: Path) -> str | None:
    if (file := inside(path, "chat_template.jinja")) is not None:
        return read_text(file)
    template: Any = None
    for name in ("chat_template.json", "tokenizer_config.json"):
        if template is None and (file := inside(path, name)) is not None:
            try:
                template = json.loads(read_text(file)).get("chat_template")
            except (ValueError, AttributeError, RecursionError):
                raise CheckpointError(f"{file} is not a JSON table; get it again") from None
    if isinstance(template, list):  # several by name
        by_name = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None
