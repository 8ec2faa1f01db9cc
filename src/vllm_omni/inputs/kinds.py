"""Values as annotations ask for them: one check for the fields of every dataclass that a caller fills."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class MisfitError(ValueError):
    """A value is of the wrong kind; the message says what is taken."""


@cache
def kinds_of(cls: Any) -> Mapping[str, Any]:
    """The annotations of a dataclass by field."""
    return get_type_hints(cls)


def fit(value: Any, kind: Any) -> Any:
    """`value` as the plain Python value that the annotation `kind` asks for. Raises MisfitError.

    Numbers of other libraries become int and float, so do arrays and tensors without dimensions (NumPy, PyTorch), and
    lists and one-dimensional arrays become tuples: nothing else can be sent to a worker. A bool is no number, and NaN
    is none.
    """
    value = _without_array(value)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (UnionType, Union):
        kinds = [argument for argument in arguments if argument is not NoneType]
        if value is None or (isinstance(value, bool) and bool in kinds):
            return value
        return fit(value, next((argument for argument in kinds if argument is not bool), bool))
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise MisfitError("one of " + ", ".join(map(str, arguments)))
        return str(value)
    if origin in (tuple, Sequence):
        return _fit_items(value, arguments[0])
    if origin is Mapping:
        return dict(_instance(value, Mapping, "a mapping"))
    if kind is float:
        return _fit_number(value)
    if kind is int:
        return int(_instance(value, Integral, "an integer", but_no=bool))
    if kind is str:
        return str(_instance(value, str, "a string"))
    return _instance(value, kind, "true or false" if kind is bool else f"a {kind.__name__}")


def _without_array(value: Any) -> Any:
    """The Python number in an array without dimensions; other values as they are."""
    # By attributes: this module imports no PyTorch, and there are more such libraries.
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _instance(value: Any, cls: Any, words: str, but_no: tuple[type, ...] | type = ()) -> Any:
    if not isinstance(value, cls) or isinstance(value, but_no):
        raise MisfitError(words)
    return value


def _fit_number(value: Any) -> float:
    try:
        number = float(_instance(value, Real, "a number", but_no=bool))
    except OverflowError:
        raise MisfitError("a number") from None
    if math.isnan(number):
        raise MisfitError("a number")
    return number


def _fit_items(value: Any, kind: Any) -> tuple[Any, ...]:
    words = "a list of integers" if kind is int else "a list of numbers"
    try:
        return tuple(fit(item, kind) for item in _instance(value, Iterable, words, but_no=(str, bytes, Mapping)))
    except (MisfitError, TypeError):  # the second: an array without dimensions says that it can be iterated over
        raise MisfitError(words) from None
