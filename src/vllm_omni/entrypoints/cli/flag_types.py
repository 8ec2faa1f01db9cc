"""Types of flag values: functions that turn a flag's text into a value, or raise an error with the accepted values."""

from __future__ import annotations

import argparse
import ipaddress
import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def _wrong(takes: str, got: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"takes {takes}, got {got!r}")


def _type(takes: str, convert: Callable[[str], T], is_right: Callable[[T], object]) -> Callable[[str], T]:
    """Type of the values that `convert` accepts and `is_right` approves; others raise an error with `takes`."""

    def parse(text: str) -> T:
        with suppress(ValueError):
            if is_right(value := convert(text)):
                return value
        raise _wrong(takes, text)

    return parse


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """Type of integers of at least `least` and, if given, at most `most`."""
    takes = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
    return _type(takes, int, lambda value: least <= value <= (value if most is None else most))


def seconds(*, zero: bool) -> Callable[[str], float]:
    """Type of finite numbers of seconds: from 0 on with `zero`, else above 0."""
    takes = f"a finite number of seconds{', 0 or more' if zero else ' above 0'}"
    return _type(takes, float, lambda value: math.isfinite(value) and (value > 0 or (value == 0 and zero)))


def integer_or_auto(least: int) -> Callable[[str], int | None]:
    """Type of integers of at least `least`, and of `auto`, which is None."""
    takes = f"auto or an integer of at least {least}"
    return _type(
        takes, lambda text: None if text == "auto" else int(text), lambda value: value is None or value >= least
    )


share = _type("a number above 0 and at most 1", float, lambda value: 0 < value <= 1)
nonempty = _type("a string that is not empty", str, str.strip)
existing_file = _type("a file that exists", str, lambda text: Path(text).is_file())
import_path = _type(
    "an import path such as package.module.Middleware",
    str,
    lambda text: "." in text and all(part.isidentifier() for part in text.split(".")),
)
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
host_name = _type(
    "an exact host name such as images.example.com (xn--... where it is not ASCII)",
    str.lower,
    re.compile(rf"{_LABEL}(\.{_LABEL})*").fullmatch,
)
"""A host name in lower case, without scheme, port and wildcard."""


_MEMORY_UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}


def memory_size(text: str) -> int:
    """Bytes of a size such as 24GiB, 80GB or 8192MiB."""
    match = re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?) ?({'|'.join(_MEMORY_UNITS)})", text)
    if match is None or (size := int(float(match[1]) * _MEMORY_UNITS[match[2]])) == 0:
        raise _wrong("a size above 0 with its unit, GiB, GB, MiB or MB, such as 24GiB", text)
    return size


def picture_size(text: str) -> tuple[int, int]:
    """(width, height) of `WxH` in pixels."""
    width, _, height = text.partition("x")
    if not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise _wrong("WIDTHxHEIGHT in pixels", text)
    return int(width), int(height)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise argparse.ArgumentTypeError(f"takes each key once, got {twice[0]!r} twice")
    return dict(pairs)


json_object: Callable[[str], dict[str, Any]] = _type(
    'a JSON object such as {"key": 1}',
    partial(json.loads, object_pairs_hook=_unique_keys),
    lambda value: isinstance(value, dict),
)
_json_list: Callable[[str], list[dict[str, Any]]] = _type(
    'a JSON list of objects such as [{"key": 1}]',
    partial(json.loads, object_pairs_hook=_unique_keys),
    lambda items: all(isinstance(item, dict) for item in items),
)
_json_strings: Callable[[str], list[str]] = _type(
    "a JSON list of strings or plain strings", json.loads, lambda items: all(isinstance(item, str) for item in items)
)


def json_objects(text: str) -> list[dict[str, Any]]:
    """JSON objects from a list of them, or one."""
    return _json_list(text) if text.startswith("[") else [json_object(text)]


def strings(text: str) -> list[str]:
    """Strings from a JSON list, the form that vLLM accepts, or from one plain string."""
    return _json_strings(text) if text.startswith("[") else [text]


def secret(text: str) -> str:
    """A key. An empty one is refused: an unset shell variable must not leave the server without protection."""
    if not text.strip():
        raise argparse.ArgumentTypeError("takes a key, got an empty string")
    return text


def proxies(text: str) -> list[str]:
    """IP addresses and networks, separated by commas, or `*`."""
    for part in (parts := comma_list(text)):
        try:
            if part != "*":
                ipaddress.ip_network(part)
        except ValueError:
            raise _wrong("IP addresses, networks such as 10.0.0.0/8, or *", part) from None
    return parts


def root_path(text: str) -> str:
    """A URL path prefix without its last slash: `/omni`."""
    if text in ("", "/"):
        return ""
    if not text.startswith("/") or "//" in text or "?" in text or "#" in text:
        raise _wrong("a path that begins with /, such as /omni", text)
    return text.rstrip("/")


def comma_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
