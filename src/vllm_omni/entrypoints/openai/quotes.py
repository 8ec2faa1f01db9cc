"""Quotes of a client's values in error messages."""

from __future__ import annotations

from itertools import islice
from reprlib import Repr
from typing import Any

MAX_QUOTE = 60


class _Short(Repr):
    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """Take the first few entries before reprlib does: it would sort all keys."""
        return super().repr_dict(dict(islice(x.items(), self.maxdict + 1)), level)


_SHORT = _Short()
_SHORT.maxlevel = 3
_SHORT.maxstring = MAX_QUOTE


def quote(value: Any) -> str:
    """The beginning of the `repr` of `value`. Takes the same time for a value of any size or depth."""
    text = _SHORT.repr(value)
    return text if len(text) <= MAX_QUOTE else text[:MAX_QUOTE] + "..."
