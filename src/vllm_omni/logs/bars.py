"""Progress bars on standard error."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, desc: str, *, shown: bool, **settings: Any) -> tqdm:
    """A tqdm bar whose writes never raise: a closed terminal must not end what the bar counts."""
    # Without standard error (a daemon's may be closed), tqdm's own default would fail.
    shown = shown and sys.stderr is not None
    return tqdm(total=total, desc=desc, disable=not shown, file=_Unfailing(sys.stderr), **settings)


class HiddenBar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A bar that writes nothing, for libraries that take a class of bars."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "disable": True})


class _Unfailing:
    """A text file without errors: what cannot be written is lost."""

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
