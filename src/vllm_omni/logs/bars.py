"""Progress bars on standard error."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, desc: str, *, shown: bool, **settings: Any) -> tqdm:
    """tqdm bar whose writes never raise: a closed terminal must not end the work that the bar counts."""
    # tqdm fails without standard error, which a daemon may have closed.
    shown = shown and sys.stderr is not None
    return tqdm(total=total, desc=desc, disable=not shown, file=_ErrorFreeFile(sys.stderr), **settings)


class HiddenBar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """Bar that writes nothing, for libraries that take a tqdm class."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "disable": True})


class _ErrorFreeFile:
    """Text file that ignores write errors; text that cannot be written is lost."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._file.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
