"""Rule for the names of LoRA adapters. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_omni.inputs.field_values import WrongValueError

MAX_NAME_CHARACTERS = 128
MAX_LISTED = 20
"""Most names that an error message lists."""


def check_adapter_name(name: Any) -> None:
    """Raise WrongValueError unless `name` can stand in a log line, a header and a URL as one word of text."""
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
        raise WrongValueError(f"a name of 1 to {MAX_NAME_CHARACTERS} printable characters")
    if name != name.strip():
        raise WrongValueError("a name without spaces around it")


def is_adapter_name(name: str) -> bool:
    """Whether `check_adapter_name` accepts the name."""
    try:
        check_adapter_name(name)
    except WrongValueError:
        return False
    return True


def listed(names: Sequence[str]) -> str:
    """Names for an error message: the first MAX_LISTED, and the number of the others."""
    others = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + others or "none"
