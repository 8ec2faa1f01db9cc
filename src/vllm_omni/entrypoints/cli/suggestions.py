"""Errors for unknown flags, with the most similar known flags."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches

MAX_COMPLETIONS = 4
LEAST_RATIO = 0.7
"""Least similarity (difflib's ratio) of a flag that is suggested."""


def explain_unknown(words: Sequence[str], known: Iterable[str], own: Collection[str], help_command: str) -> str:
    """Error line for words that no flag takes; it does not repeat the values of unknown flags."""
    flags = list(dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("-")))
    if not flags:
        return f"unrecognized {' '.join(words)!r}: a flag before it takes fewer values, or MODEL is given twice"
    known = list(known)
    said = [f"unrecognized {flag}{_advice(flag, known, own)}" for flag in flags]
    return "; ".join(said) + f" (`{help_command}` lists the flags)"


def _advice(flag: str, known: Sequence[str], own: Collection[str]) -> str:
    names = nearest(flag, known, own)
    return f": did you mean {' or '.join(names)}?" if names else ""


def nearest(flag: str, known: Sequence[str], own: Collection[str]) -> list[str]:
    """Known flags that begin with `flag`, only our own if there are any; otherwise the most similar flag."""
    if not flag.startswith("--"):
        return []
    whole = [name for name in known if name.startswith(flag)]
    if completions := [name for name in whole if name in own] or whole:
        return completions[:MAX_COMPLETIONS]
    return get_close_matches(flag, known, 1, LEAST_RATIO)
