"""Write docs/flags.md, the treatment of other servers' flags, from the tables in `vllm_omni/foreign`.

.venv/bin/python -m tools.flags
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from vllm_omni.foreign.diffusion_server_flags import SGLANG_FLAGS, VLLM_OMNI_FLAGS
from vllm_omni.foreign.flags import Arity, ForeignFlag, Treatment
from vllm_omni.foreign.vllm_flags import SAME_HERE, VLLM_FLAGS

PAGE = Path(__file__).parent.parent / "docs" / "flags.md"
INTRO = """# Flags of other servers

<!-- written by tools/flags.py from src/vllm_omni/foreign/vllm_flags.py and diffusion_server_flags.py -->

`vllm serve --omni --help` lists the flags of this server. A command line written for another server gets one of these
answers, also from a `--config` file, with underscores for dashes, and as `--json-flag.key value`:

- the flag is the same here;
- it is ignored, because the pictures, limits, addresses and devices are the same without it: one line in the log names
  all flags that were ignored;
- it has another name here: the program ends and says which;
- it is refused, because the user would get another result without it: the program ends and says why.

An unknown flag ends the program too; the error suggests the most similar known flag. A renamed or refused flag is
ignored with a value in the last column, because this server does the same without it, and as `--no-flag`.
"""
_VALUES: dict[Arity, str] = {"switch": "", "one": " X", "several": " X ...", "optional": " [X]"}


def main() -> None:
    PAGE.write_text(page())
    print(f"{PAGE}: {len(VLLM_FLAGS)} flags of vLLM, {len(VLLM_OMNI_FLAGS) + len(SGLANG_FLAGS)} of others")


def page() -> str:
    parts = [
        INTRO,
        "## vLLM 0.32\n",
        f"The same here: {', '.join(f'`{name}`' for name in SAME_HERE)}.\n",
        *_tables(VLLM_FLAGS),
        "## vllm-omni 0.30, the public package\n",
        "The same here: `--usp`, `--ring`, `--cache-backend`, `--vae-use-tiling` and others in `--help`.\n",
        *_tables(VLLM_OMNI_FLAGS),
        "## SGLang Diffusion\n",
        "The same here: `--ulysses-degree`, `--ring-degree`, `--revision`, `--host`, `--port`.\n",
        *_tables(SGLANG_FLAGS),
    ]
    return "\n".join(parts)


def _tables(flags: Sequence[ForeignFlag]) -> Iterator[str]:
    """Table for each treatment, with one row for neighbours of the same text."""
    headings: dict[Treatment, tuple[str, ...]] = {
        "ignored": ("ignored", "flags"),
        "renamed": ("here", "flags", "ignored with"),
        "refused": ("refused, because", "flags", "ignored with"),
    }
    for treatment, heading in headings.items():
        yield _row(*heading)
        yield "|---" * len(heading) + "|"
        rows = [flag for flag in flags if flag.treatment == treatment]
        for (text, harmless), group in groupby(rows, key=lambda flag: (flag.text, _harmless(flag))):
            cells = [text, ", ".join(f"`{'`, `'.join(flag.names)}{_VALUES[flag.arity]}`" for flag in group), harmless]
            yield _row(*cells[: len(heading)])
        yield ""


def _harmless(flag: ForeignFlag) -> str:
    return ", ".join(f"`{value}`" for value in flag.harmless)


def _row(*cells: str) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


if __name__ == "__main__":
    main()
