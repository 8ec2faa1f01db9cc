"""Progress bars of diffusers and transformers, which would overwrite ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import transformers
from tqdm import tqdm


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide the libraries' bars while weights load: one bar of ours counts all weights."""
    libraries = [lib for lib in (diffusers.utils.logging, transformers.utils.logging) if lib.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


class StepBar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """Hidden progress bar that calls `on_step` after each step, for pipelines without a step callback."""

    def __init__(self, iterable: Any, total: int | None, on_step: Callable[[], object]) -> None:
        super().__init__(iterable, total=total, disable=True)
        self._on_step = on_step

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self._on_step()

    def update(self, n: float | None = 1) -> bool | None:
        self._on_step()
        return None
