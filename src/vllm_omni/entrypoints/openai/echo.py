"""What a client sent, as an error message may quote it."""

from __future__ import annotations

from reprlib import Repr
from typing import Any

MAX_ECHO = 60

_SHORT = Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = MAX_ECHO


def echo(value: Any) -> str:
    """The beginning of its `repr`; what is beyond that, or deep inside, is not even looked at."""
    text = _SHORT.repr(value)
    return text if len(text) <= MAX_ECHO else text[:MAX_ECHO] + "..."
