"""Conversion of a caller's values to the types of dataclass fields: the one check of all such fields."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

MAX_INTEGER_BITS = 63
"""Most bits of an integer; msgpack cannot send larger ones to a worker."""
_MAX_SHOWN = 200
"""Most characters of a value in an error message."""


class WrongValueError(ValueError):
    """A value has the wrong type; the message names the accepted values."""


@cache
def field_types(cls: Any) -> Mapping[str, Any]:
    """Types of a dataclass's fields, by name."""
    return get_type_hints(cls)


def coerce(value: Any, kind: Any) -> Any:
    """Convert `value` to a plain Python value of the annotated type `kind`. Raises WrongValueError.

    Numbers of other libraries, and arrays and tensors without dimensions, become int and float; lists and
    one-dimensional arrays become tuples: only plain values can be sent to a worker. Neither a bool nor NaN is a
    number. Fields of a dataclass are converted, too.
    """
    value = _without_array(value)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (UnionType, Union):
        kinds = [argument for argument in arguments if argument is not NoneType]
        if value is None or (isinstance(value, bool) and bool in kinds):
            return value
        several = next((argument for argument in kinds if get_origin(argument) is Sequence), None)
        if several is not None and (isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1):
            return coerce(value, several)
        return coerce(value, next((argument for argument in kinds if argument is not bool), bool))
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise WrongValueError("one of " + ", ".join(map(str, arguments)))
        return str(value)
    if origin in (tuple, Sequence):
        return _fit_items(value, arguments[0])
    if origin is Mapping:
        return dict(_instance(value, Mapping, "a mapping"))
    if kind is float:
        return _fit_number(value)
    if kind is int:
        return _fit_integer(value)
    if kind is str:
        return str(_instance(value, str, "a string"))
    instance = _instance(value, kind, "true or false" if kind is bool else f"a {kind.__name__}")
    return _fit_fields(instance) if is_dataclass(instance) else instance


def shown(value: Any) -> str:
    """Text of a value for an error message, in one line."""
    try:
        return f"{' '.join(repr(value).split()):.{_MAX_SHOWN}}"
    except ValueError:  # an integer with more digits than Python writes
        return f"a huge {type(value).__name__}"


def _without_array(value: Any) -> Any:
    """Python number in an array without dimensions; other values are returned unchanged."""
    # Recognized by attributes: this module does not import PyTorch, and other libraries have such arrays too.
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except RuntimeError:  # a tensor of the meta device, which has no numbers
        raise WrongValueError("a value that has numbers") from None


def _instance(value: Any, cls: Any, words: str, but_no: tuple[type, ...] | type = ()) -> Any:
    if not isinstance(value, cls) or isinstance(value, but_no):
        raise WrongValueError(words)
    return value


def _fit_fields(value: Any) -> Any:
    plain, cls = {}, cast(Any, type(value))
    for name, kind in field_types(cls).items():
        try:
            plain[name] = coerce(getattr(value, name), kind)
        except WrongValueError as error:
            raise WrongValueError(f"a {cls.__name__} whose {name} is {error}") from None
    return replace(value, **plain)


def _fit_integer(value: Any) -> int:
    number = int(_instance(value, Integral, "an integer", but_no=bool))
    if number.bit_length() > MAX_INTEGER_BITS:
        raise WrongValueError(f"an integer of up to {MAX_INTEGER_BITS} bits")
    return number


def _fit_number(value: Any) -> float:
    real = _instance(value, Real, "a number", but_no=bool)
    try:
        number = float(real)
    except OverflowError:
        raise WrongValueError(f"a number of at most {sys.float_info.max:g}") from None
    if math.isnan(number):
        raise WrongValueError("a number")
    return number


def _fit_items(value: Any, kind: Any) -> tuple[Any, ...]:
    words = "a list of " + {int: "integers", float: "numbers"}.get(kind, kind.__name__)
    # Not an iterator: one object may serve many prompts, and the first would exhaust it.
    but_no = (str, bytes, Mapping, Iterator)
    try:
        return tuple(coerce(item, kind) for item in _instance(value, Iterable, words, but_no=but_no))
    except (WrongValueError, TypeError):  # TypeError: an array without dimensions is not iterable
        raise WrongValueError(words) from None
