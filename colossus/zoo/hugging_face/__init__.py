"""Hugging Face's form of a model: its config.json and the names, shapes and order of the tensors in its files.

architecture_of(model)      the architecture that can hold a model
model_of(config, name)      the model that a config.json describes
architecture_in(config)     ... and the architecture that it names
"""

from colossus.zoo.hugging_face.architecture import Architecture
from colossus.zoo.hugging_face.find import (
    ARCHITECTURES,
    architecture_in,
    architecture_of,
    model_of,
    quantization_in,
    read_config,
    safe_name,
)
from colossus.zoo.hugging_face.tensors import Part, StoredTensor

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Part",
    "StoredTensor",
    "architecture_in",
    "architecture_of",
    "model_of",
    "quantization_in",
    "read_config",
    "safe_name",
]
