"""What a Hugging Face architecture is to Colossus: how its config.json is read and written, and what tensors it has."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from colossus.spec.model import ModelSpec
from colossus.zoo.hugging_face.fields import Fields
from colossus.zoo.hugging_face.tensors import StoredTensor

NO_WEIGHTS = r"(.*\.)?rotary_emb\.inv_freq|lm_head\.weight"
"""Stored by some releases: tables of rotations, and a head that is the embedding once more."""


def _same_name(name: str) -> str:
    return name


@dataclass(frozen=True, slots=True)
class Architecture:
    """One class of models, as `transformers`, vLLM and SGLang know it."""

    name: str
    """As in `architectures` of a config.json: `LlamaForCausalLM`."""
    model_type: str
    read_fields: Callable[[Fields, str], ModelSpec]
    write_fields: Callable[[ModelSpec], dict[str, Any]]
    """The fields apart from `architectures` and `model_type`."""
    tensors: Callable[[ModelSpec], Iterator[StoredTensor]]
    """The stored tensors of a model that this architecture can hold, in the order of a file."""
    no_weights: str = NO_WEIGHTS
    """Names, as a regular expression, of stored tensors that carry no weight of the model."""
    canonical: Callable[[str], str] = _same_name
    """A name as some files write it, to the one that `tensors` has for it."""
    in_transformers: bool = True
    """Whether `transformers` has it; Grok's are in vLLM and SGLang alone."""
    has_extra_layers: bool = False
    """Files may hold a layer after the last, which predicts a second token and is not part of the model."""

    def read(self, config: Mapping[str, Any], name: str) -> ModelSpec:
        """The model that a config.json describes. Raises ConfigError for what a ModelSpec cannot say."""
        return self.read_fields(Fields(config), name)

    def write(self, model: ModelSpec) -> dict[str, Any]:
        """The content of its config.json, without `dtype`, which depends on what is stored, and with no tokens'
        numbers, which depend on the tokenizer.

        `architecture_of` says whether the architecture can hold all of the model; this does not look."""
        named = {"architectures": [self.name], "model_type": self.model_type}
        none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return {**named, **self.write_fields(model), **none}

    def ignored(self, name: str, model: ModelSpec | None = None) -> bool:
        """Whether a stored tensor that `tensors` does not have may be passed over.

        To be asked of names that are not in the table: `lm_head.weight` is, in a model whose head is not tied.
        `model` makes the answer exact where it depends on the number of layers."""
        name = self.canonical(name)
        if self.has_extra_layers:
            extra = 61 if model is None else model.num_layers
            if name.startswith(f"model.layers.{extra}."):
                return True
        return re.fullmatch(self.no_weights, name) is not None
