"""Loading of a model's tokenizer, which transformers reads (no torch at import)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_omni.errors import ConfigError, in_one_line


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer in `folder`. Raises ConfigError, with the reason, where it cannot be read."""
    # Lazy: transformers imports torch, and `--help` and validation must not.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # files that are wrong in another way end in errors of any class
        raise ConfigError(f"{folder.name}/: transformers cannot load the tokenizer: {in_one_line(error)}") from error
