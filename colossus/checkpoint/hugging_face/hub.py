"""A model directory by path, or by its name on the Hugging Face hub where there is network."""

import re
from pathlib import Path

from colossus.errors import ConfigError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
"""All that importing looks at; nothing that could run."""


def find_directory(text: str) -> Path:
    """The directory, or a hub's model of that name (`owner/name`), downloaded into the hub's own cache.

    Raises ConfigError where there is neither.
    """
    path = Path(text)
    if path.exists():
        return path
    if not _HUB_NAME.fullmatch(text) or ".." in text:
        raise ConfigError(
            f"there is no directory {text}; give one that holds config.json and .safetensors files, or a name on "
            f"the Hugging Face hub (owner/name)"
        )
    elsewhere = (
        f"download it where there is network (hf download {text} --local-dir DIR) and give that directory"
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            f"there is no directory {text} here, and fetching a hub's model of that name takes the package "
            f"huggingface_hub: pip install 'colossus-llm[hub]'; or {elsewhere}"
        ) from None
    try:
        return Path(snapshot_download(text, allow_patterns=list(_FILES)))
    except Exception as error:  # the package's own errors, and those of the network library that it uses
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"there is no directory {text} here, and a hub's model of that name could not be fetched ({reason}); "
            f"{elsewhere}"
        ) from None
