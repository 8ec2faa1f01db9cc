"""Words of the command line that are not ours: other commands, flags of other servers, unknown flags.

The parser knows the flags of other servers, so that it can explain each one and takes none of their values for the
model's name.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import PurePath
from typing import Any

from vllm_omni.errors import ConfigError
from vllm_omni.foreign.flags import Arity, ForeignFlag

SERVE = "serve"
CALIBRATE = "calibrate-teacache"
PLAN = "plan"
OTHER_COMMANDS = {
    "bench": "vLLM's has no backend for the images API; measure a running server from a checkout of vllm-omni: "
    "python -m benchmarks.serving --base-url http://127.0.0.1:8000/v1",
    "chat": "vLLM's prints text only; ask a running server with the OpenAI SDK or curl: POST /v1/images/generations",
    "collect-env": "run it without --omni: vllm collect-env",
    "complete": "no text is made; ask a running server with the OpenAI SDK or curl: POST /v1/images/generations",
    "download-kernels": "run it without --omni: vllm download-kernels",
    "launch": "it starts parts of a server of language models",
    "preload": "it is for language models",
    "run-batch": "it is for language models; send the requests to a running server: POST /v1/images/generations",
    "snapshot": "it is for language models",
}
"""vLLM's other commands -> what to run instead."""
_WITHOUT_COMMAND = ("-h", "--help", "-v", "--version")
MAX_COMPLETIONS = 4
LEAST_RATIO = 0.7
"""Least similarity (difflib's ratio) of a flag that is suggested."""
NARGS: dict[Arity, int | str | None] = {"switch": 0, "one": None, "several": "+", "optional": "?"}
"""Arity -> argparse's `nargs`."""
DEST = "foreign_flags"


def program_name(argv0: str) -> str:
    """`vllm-omni` if started under that name or as our module, otherwise `vllm`, whose command has called us."""
    path = PurePath(argv0)
    is_ours = path.name == "vllm-omni" or path.parts[-4:] == ("vllm_omni", "entrypoints", "cli", "main.py")
    return "vllm-omni" if is_ours else "vllm"


def check_command(words: Sequence[str], serve_line: str) -> None:
    """Raise ConfigError, with what to run instead, unless the words begin with `serve`, `--help` or `--version`."""
    command = words[0] if words else ""
    if command == SERVE or command in _WITHOUT_COMMAND:
        return
    if not command or command.startswith("-"):
        raise ConfigError(f"a command is missing: {serve_line}")
    if command in OTHER_COMMANDS:
        raise ConfigError(f"{command} is not for image servers: {OTHER_COMMANDS[command]}")
    close = get_close_matches(command, [SERVE, *OTHER_COMMANDS], 1)
    advice = f"did you mean {close[0]}?" if close else f"the command is {serve_line}"
    raise ConfigError(f"{command!r} is no command: {advice}")


def explain_unknown(words: Sequence[str], known: Iterable[str], own: Collection[str], help_command: str) -> str:
    """Error line for words that no flag takes; it does not repeat the values of unknown flags."""
    flags = list(dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("-")))
    if not flags:
        return f"unrecognized {' '.join(words)!r}: a flag before it takes fewer values, or MODEL is given twice"
    known, said = list(known), []
    for flag in flags:
        names = nearest(flag, known, own)
        said.append(f"unrecognized {flag}" + (f": did you mean {' or '.join(names)}?" if names else ""))
    return "; ".join(said) + f" (`{help_command}` lists the flags)"


def nearest(flag: str, known: Sequence[str], own: Collection[str]) -> list[str]:
    """Known flags that begin with `flag`, only our own if there are any; otherwise the most similar flag."""
    if not flag.startswith("--"):
        return []
    whole = [name for name in known if name.startswith(flag)]
    if completions := [name for name in whole if name in own] or whole:
        return completions[:MAX_COMPLETIONS]
    return get_close_matches(flag, known, 1, LEAST_RATIO)


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
