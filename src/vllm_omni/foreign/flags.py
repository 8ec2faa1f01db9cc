"""Flags of other servers: how many values each takes, and whether it is ignored, renamed or refused here.

The tables are `vllm_flags.py` and `diffusion_server_flags.py`. Their readers are the command line's parser
(`entrypoints/cli/commands.py`) and the keywords of scripts (`foreign/keywords.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Treatment = Literal["ignored", "renamed", "refused"]
Arity = Literal["switch", "one", "several", "optional"]

_SUFFIXES: dict[str, Arity] = {"": "switch", "=": "one", "=+": "several", "=?": "optional"}


@dataclass(frozen=True)
class ForeignFlag:
    """One flag of another server."""

    names: tuple[str, ...]
    arity: Arity
    treatment: Treatment
    text: str
    """For an ignored flag its topic, for a renamed one the flag to use here, for a refused one the reason."""
    harmless: tuple[str, ...] = ()
    """Values with which a renamed or refused flag is ignored, because this server does the same without it."""

    @property
    def option_strings(self) -> tuple[str, ...]:
        """All spellings of the flag, with the `--no-` form of a switch."""
        if self.arity != "switch":
            return self.names
        return (*self.names, *(f"--no-{name[2:]}" for name in self.names if name.startswith("--")))

    def is_harmless(self, values: Sequence[str]) -> bool:
        """Whether the flag may be ignored with these values: the user gets the same result."""
        if self.treatment == "ignored":
            return True
        return bool(values) and all(self._is_harmless(value) for value in values)

    def _is_harmless(self, value: str) -> bool:
        if value in self.harmless:
            return True
        try:
            number = float(value)
        except ValueError:
            return False
        return any(number == float(text) for text in self.harmless if text.replace(".", "", 1).isdigit())


def ignored(topic: str, specs: str) -> tuple[ForeignFlag, ...]:
    """Flags that have no effect here. `specs`: see `parse_spec`."""
    return _flags("ignored", topic, specs)


def renamed(here: str, specs: str, *harmless: str) -> tuple[ForeignFlag, ...]:
    """Flags that are named `here` in this server."""
    return _flags("renamed", here, specs, harmless)


def refused(reason: str, specs: str, *harmless: str) -> tuple[ForeignFlag, ...]:
    """Flags that cannot be ignored, because the user would get another result."""
    return _flags("refused", reason, specs, harmless)


def _flags(treatment: Treatment, text: str, specs: str, *harmless: Any) -> tuple[ForeignFlag, ...]:
    return tuple(ForeignFlag(*parse_spec(spec), treatment, text, *harmless) for spec in words(specs))


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def parse_spec(spec: str) -> tuple[tuple[str, ...], Arity]:
    """Names and arity of `--name/-n`, followed by `=` for one value, `=+` for one or more, `=?` for none or one."""
    names, equals, rest = spec.partition("=")
    return tuple(names.split("/")), _SUFFIXES[equals + rest]
