"""Flags of other servers: how many values each takes, and whether it is ignored, named differently here, or refused.

The tables are `vllm_flags.py` and `diffusion_server_flags.py`. The parser knows all their flags, so that none of them
is "unrecognized" and none of their values is taken for the model's name.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vllm_omni.errors import ConfigError

Treatment = Literal["ignored", "renamed", "refused"]
Arity = Literal["switch", "one", "several", "optional"]

NARGS: dict[Arity, int | str | None] = {"switch": 0, "one": None, "several": "+", "optional": "?"}
"""argparse's `nargs` of each arity."""
_SUFFIXES: dict[str, Arity] = {"": "switch", "=": "one", "=+": "several", "=?": "optional"}
DEST = "foreign_flags"


@dataclass(frozen=True)
class ForeignFlag:
    """One flag of another server."""

    names: tuple[str, ...]
    arity: Arity
    treatment: Treatment
    text: str
    """Ignored: the topic. Renamed: what to use here. Refused: the reason."""
    harmless: tuple[str, ...] = ()
    """Values with which a renamed or refused flag is ignored: they ask for what is done anyway."""
    harmless_from: float | None = None
    """Numbers from this one on are harmless too."""

    @property
    def option_strings(self) -> tuple[str, ...]:
        """All spellings, the negated ones of switches included."""
        if self.arity != "switch":
            return self.names
        return (*self.names, *(f"--no-{name[2:]}" for name in self.names if name.startswith("--")))

    def is_harmless(self, values: Sequence[str]) -> bool:
        """Whether ignoring these values gives the user what the flag asks for."""
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
        if self.harmless_from is not None and number >= self.harmless_from:
            return True
        return any(number == float(text) for text in self.harmless if text.replace(".", "", 1).isdigit())


@dataclass(frozen=True)
class GivenFlag:
    """One use of a foreign flag on the command line or in a config file."""

    flag: ForeignFlag
    spelling: str
    values: tuple[str, ...]

    @property
    def is_ignored(self) -> bool:
        negated = self.flag.arity == "switch" and self.spelling.startswith("--no-")
        return negated or self.flag.is_harmless(self.values)

    @property
    def complaint(self) -> str:
        """The error of a flag that is not ignored."""
        if self.flag.treatment == "renamed":
            return f"{self.spelling}: here {self.flag.text}"
        return f"{' '.join((self.spelling, *self.values))}: {self.flag.text}"


def ignored(topic: str, specs: str) -> tuple[ForeignFlag, ...]:
    """Flags without effect here. `specs`: see `parse_spec`."""
    return tuple(ForeignFlag(*parse_spec(spec), "ignored", topic) for spec in words(specs))


def renamed(here: str, specs: str, *harmless: str, harmless_from: float | None = None) -> tuple[ForeignFlag, ...]:
    """Flags whose purpose `here` serves."""
    return tuple(
        ForeignFlag(*parse_spec(spec), "renamed", here, harmless, harmless_from=harmless_from) for spec in words(specs)
    )


def refused(reason: str, specs: str, *harmless: str, harmless_from: float | None = None) -> tuple[ForeignFlag, ...]:
    """Flags that cannot be ignored: the user would get something else."""
    return tuple(
        ForeignFlag(*parse_spec(spec), "refused", reason, harmless, harmless_from=harmless_from)
        for spec in words(specs)
    )


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def parse_spec(spec: str) -> tuple[tuple[str, ...], Arity]:
    """Names and arity of `--name/-n`; after it `=` for one value, `=+` for one or more, `=?` for none or one."""
    names, equals, rest = spec.partition("=")
    return tuple(names.split("/")), _SUFFIXES[equals + rest]


def add_foreign_flags(parser: argparse.ArgumentParser, flags: Iterable[ForeignFlag]) -> None:
    """Make the parser collect the flags in `DEST`, as `GivenFlag`s; they are not in the help."""
    parser.set_defaults(**{DEST: ()})
    for flag in flags:
        parser.add_argument(
            *flag.option_strings,
            action=_Collect,
            nargs=NARGS[flag.arity],
            flag=flag,
            dest=DEST,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


class _Collect(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, flag: ForeignFlag, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **kwargs)
        self._flag = flag

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, spelling: str | None = None
    ) -> None:
        given = [values] if isinstance(values, str) else values or []
        use = GivenFlag(self._flag, spelling or self.option_strings[0], tuple(given))
        setattr(namespace, DEST, (*getattr(namespace, DEST), use))


def check_foreign_flags(given: Sequence[GivenFlag]) -> tuple[str, ...]:
    """Spellings of the ignored flags, each once. Raises ConfigError for those that are refused or named differently."""
    if complaints := [use.complaint for use in given if not use.is_ignored]:
        raise ConfigError("; ".join(dict.fromkeys(complaints)))
    return tuple(dict.fromkeys(use.spelling for use in given))
