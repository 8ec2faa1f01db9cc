"""Class decorators that handle keywords, argument order and attributes of other packages' classes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, FrozenInstanceError, fields
from functools import cache, wraps
from typing import Any, Never, TypeVar

T = TypeVar("T")
Converter = Callable[[dict[str, Any], Collection[str]], dict[str, Any]]


def convert_keywords(convert: Converter, error: Callable[[str], Exception]) -> Callable[[type[T]], type[T]]:
    """Class decorator: the constructor of a frozen dataclass also takes keywords of other packages.

    `convert(keywords, names)` is called if a keyword is not the name of a field. It returns keywords that all are, or
    raises an error that lists `names`, the fields. Its `keywords` include the positional arguments by field name.
    None stands for a field's default. The constructor raises `error` for a field that is missing or given twice and
    for too many arguments. Type checkers see the fields only.
    """

    def decorate(cls: Any) -> Any:
        construct = cls.__init__
        all_fields = fields(cls)
        names = tuple(f.name for f in all_fields)
        known = frozenset(names)
        required = tuple(f.name for f in all_fields if not _has_default(f))

        @wraps(construct)
        def init(self: Any, *args: Any, **keywords: Any) -> None:
            if len(args) > len(names):
                raise error(f"{cls.__name__} takes {', '.join(names)}: got {len(args)} arguments")
            given = dict(zip(names, args))
            if twice := given.keys() & keywords.keys():
                raise error(f"{cls.__name__}: {min(twice)} is given twice, by its place and by its name")
            given.update(keywords)
            if not given.keys() <= known:
                given = convert(given, names)
            for name in required:
                if name not in given:
                    raise error(f"{cls.__name__} needs a {name}; it takes {', '.join(names)}")
            construct(self, **without_none(cls, given))

        def refuse(self: Any, name: str, value: Any) -> Never:
            raise FrozenInstanceError(
                f"a {cls.__name__} cannot be changed: make another one with dataclasses.replace(..., {name}=...)"
            )

        cls.__init__, cls.__setattr__ = init, refuse
        return cls

    return decorate


def without_none(cls: Any, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """`keywords` without those that are None although their field of the dataclass `cls` has another default.

    Scripts pass on the None that `argparse` gives for an unused flag.
    """
    others = _never_none(cls)
    return {name: value for name, value in keywords.items() if value is not None or name not in others}


@cache
def _never_none(cls: Any) -> frozenset[str]:
    return frozenset(f.name for f in fields(cls) if _has_default(f) and f.default is not None)


def _has_default(f: Field[Any]) -> bool:
    return f.default is not MISSING or f.default_factory is not MISSING


def explain_attributes(texts: Mapping[str, str]) -> Callable[[type[T]], type[T]]:
    """Class decorator: attributes that only another package's class has raise an error that says what to use.

    `texts`: attribute name -> message of the AttributeError. Type checkers see the class's own attributes only.
    """

    def decorate(cls: Any) -> Any:
        def getattr_(self: Any, name: str) -> Never:
            raise AttributeError(
                f"{name}: {texts[name]}" if name in texts else f"{cls.__name__!r} object has no attribute {name!r}",
                name=name,
                obj=self,
            )

        cls.__getattr__ = getattr_
        return cls

    return decorate


def has_no_effect(value: Any) -> bool:
    """Whether a keyword with this value asks for nothing in any package: None, False or an empty collection."""
    return value is None or value is False or (isinstance(value, list | tuple | dict) and not value)
