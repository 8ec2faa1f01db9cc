"""Types of flag values: functions that turn a flag's text into a value, or raise an error with the accepted values."""

from __future__ import annotations

import argparse
import ipaddress
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _wrong(takes: str, got: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"takes {takes}, got {got!r}")


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """Type of integers of at least `least` and, if given, at most `most`."""
    takes = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise _wrong(takes, text) from None
        if value < least or (most is not None and value > most):
            raise _wrong(takes, text)
        return value

    return parse


def seconds(*, zero: bool) -> Callable[[str], float]:
    """Type of finite numbers of seconds: from 0 on with `zero`, else above 0."""
    takes = "a finite number of seconds, 0 or more" if zero else "a finite number of seconds above 0"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise _wrong(takes, text) from None
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise _wrong(takes, text)
        return value

    return parse


def picture_size(text: str) -> tuple[int, int]:
    """(width, height) of `WxH` in pixels."""
    width, _, height = text.partition("x")
    if not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise _wrong("WIDTHxHEIGHT in pixels", text)
    return int(width), int(height)


def json_object(text: str) -> dict[str, Any]:
    takes = 'a JSON object such as {"key": 1}'
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except ValueError:
        raise _wrong(takes, text) from None
    if not isinstance(value, dict):
        raise _wrong(takes, text)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise argparse.ArgumentTypeError(f"takes each key once, got {twice[0]!r} twice")
    return dict(pairs)


def adapter(text: str) -> tuple[str, str]:
    """(name, path) of a LoRA adapter, in either of the two forms that vLLM accepts."""
    takes = 'NAME=PATH or {"name": NAME, "path": PATH}'
    if text.startswith("{"):
        fields = json_object(text)
    else:
        name, _, path = text.partition("=")
        fields = {"name": name, "path": path}
    if set(fields) != {"name", "path"} or not all(isinstance(part, str) and part for part in fields.values()):
        raise _wrong(takes, text)
    return fields["name"], fields["path"]


def strings(text: str) -> list[str]:
    """Strings from a JSON list, the form that vLLM accepts, or from one plain string."""
    if not text.startswith("["):
        return [text]
    takes = "a JSON list of strings or plain strings"
    try:
        value = json.loads(text)
    except ValueError:
        raise _wrong(takes, text) from None
    if not all(isinstance(item, str) for item in value):
        raise _wrong(takes, text)
    return list(value)


def nonempty(text: str) -> str:
    if not text.strip():
        raise _wrong("a string that is not empty", text)
    return text


def secret(text: str) -> str:
    """A key. An empty one is refused: an unset shell variable must not leave the server without protection."""
    if not text.strip():
        raise argparse.ArgumentTypeError("takes a key, got an empty string")
    return text


def host_name(text: str) -> str:
    """A host name in lower case, without scheme, port and wildcard."""
    label = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
    if not re.fullmatch(rf"{label}(\.{label})*", text.lower()):
        raise _wrong("an exact host name such as images.example.com (xn--... where it is not ASCII)", text)
    return text.lower()


def proxies(text: str) -> list[str]:
    """IP addresses and networks, separated by commas, or `*`."""
    for part in (parts := comma_list(text)):
        try:
            if part != "*":
                ipaddress.ip_network(part)
        except ValueError:
            raise _wrong("IP addresses, networks such as 10.0.0.0/8, or *", part) from None
    return parts


def existing_file(text: str) -> str:
    if not Path(text).is_file():
        raise _wrong("a file that exists", text)
    return text


def root_path(text: str) -> str:
    """A URL path prefix without its last slash: `/omni`."""
    if text in ("", "/"):
        return ""
    if not text.startswith("/") or "//" in text or "?" in text or "#" in text:
        raise _wrong("a path that begins with /, such as /omni", text)
    return text.rstrip("/")


def import_path(text: str) -> str:
    if not all(part.isidentifier() for part in text.split(".")) or "." not in text:
        raise _wrong("an import path such as package.module.Middleware", text)
    return text


def comma_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
