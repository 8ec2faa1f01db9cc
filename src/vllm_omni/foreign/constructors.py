"""Keywords of other packages in the constructors of our dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")
Converter = Callable[[dict[str, Any], Collection[str]], dict[str, Any]]


def converting(convert: Converter) -> Callable[[type[T]], type[T]]:
    """Class decorator for a dataclass.

    `convert(keywords, names)` is called where a keyword is not the name of a field: it returns keywords that are, or
    raises an error that lists `names`. Type checkers see the fields alone.
    """

    def decorate(cls: Any) -> Any:
        construct = cls.__init__
        names = tuple(f.name for f in fields(cls))
        known = frozenset(names)

        @wraps(construct)
        def init(self: Any, *args: Any, **keywords: Any) -> None:
            if not keywords.keys() <= known:
                keywords = convert(keywords, names)
            construct(self, *args, **keywords)

        cls.__init__ = init
        return cls

    return decorate


def asks_nothing(value: Any) -> bool:
    """Whether a keyword with this value has no effect in any package: None, False, or an empty collection."""
    return value is None or value is False or (isinstance(value, list | tuple | dict) and not value)
