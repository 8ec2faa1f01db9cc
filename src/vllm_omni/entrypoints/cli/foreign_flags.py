"""Flags of other servers on the command line.

The parser knows all of them, so that it can explain each one and takes none of their values for the model's name.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_omni.errors import ConfigError
from vllm_omni.foreign.flags import Arity, ForeignFlag

NARGS: dict[Arity, int | str | None] = {"switch": 0, "one": None, "several": "+", "optional": "?"}
"""Arity -> argparse's `nargs`."""
DEST = "foreign_flags"


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
        """Error message for a flag that is not ignored."""
        if self.flag.treatment == "renamed":
            return f"{self.spelling}: here {self.flag.text}"
        return f"{' '.join((self.spelling, *self.values))}: {self.flag.text}"


def add_foreign_flags(parser: argparse.ArgumentParser, flags: Iterable[ForeignFlag]) -> None:
    """Make the parser collect these flags in `DEST`, as `GivenFlag`s; `--help` does not list them."""
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
    """Spellings of the ignored flags, each once. Raises ConfigError for flags that are renamed or refused."""
    if complaints := [use.complaint for use in given if not use.is_ignored]:
        raise ConfigError("; ".join(dict.fromkeys(complaints)))
    return tuple(dict.fromkeys(use.spelling for use in given))
