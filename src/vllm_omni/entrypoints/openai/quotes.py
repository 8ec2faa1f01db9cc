"""What a client sent, as an error message may quote it."""

from __future__ import annotations

from itertools import islice
from reprlib import Repr
from typing import Any

MAX_QUOTE = 60


class _Short(Repr):
    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """Of the first few: reprlib sorts all keys before it takes some."""
        return super().repr_dict(dict(islice(x.items(), self.maxdict + 1)), level)


_SHORT = _Short()
_SHORT.maxlevel = 3
_SHORT.maxstring = MAX_QUOTE


def quote(value: Any) -> str:
    """The beginning of its `repr`; what is beyond that, or deep inside, is not even looked at."""
    text = _SHORT.repr(value)
    return text if len(text) <= MAX_QUOTE else text[:MAX_QUOTE] + "..."
