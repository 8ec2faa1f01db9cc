"""Loading of a model's tokenizer with transformers. Importing this module imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_omni.errors import ConfigError, error_line


def load_tokenizer(folder: Path, cls: type[Any] | None = None) -> Any:
    """Tokenizer in `folder`, of `cls` or of the class that the folder names. Raises ConfigError with the reason."""
    # Imported here because transformers imports torch, which `--help` and validation must not.
    from transformers import AutoTokenizer

    try:
        tokenizer = (cls or AutoTokenizer).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # wrong files may raise anything
        raise ConfigError(f"{folder.name}/: transformers cannot load the tokenizer: {error_line(error)}") from error
    if len(tokenizer) == len(tokenizer.get_added_vocab()):
        raise ConfigError(f"{folder.name}/: the {type(tokenizer).__name__} has an empty vocabulary")
    return tokenizer
