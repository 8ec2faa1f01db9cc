"""Handling of SIGTERM and SIGINT: the first signal asks the server to stop, the second ends the process."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
KILLED_EXIT_CODE = 128
"""Exit code of a process that a signal ended at once is this number plus the signal's number."""


class StopSignals:
    """Handlers of SIGTERM and SIGINT, installed while the context is open. They need no event loop.

    Before `on_first` is called, and from the second signal on, a signal calls `end` with 128 + its number, even if the
    main thread is busy. The default action would have no effect on the first process of a container.
    """

    def __init__(self, end: Callable[[int], object]) -> None:
        self._end = end
        self._ask: Callable[[str], object] | None = None
        self._cleanups: list[Callable[[], object]] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_first(self, ask: Callable[[str], object]) -> None:
        """Call `ask` with the name of the next signal instead of ending the process.

        `ask` is called in the main thread, between any two instructions.
        """
        self._ask = ask

    def before_end(self, cleanup: Callable[[], object]) -> None:
        """Call `cleanup` before a signal ends the process."""
        self._cleanups.append(cleanup)

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        ask, self._ask = self._ask, None
        if ask is not None:
            ask(name)
            return
        logger.info("%s: ending at once", name)
        try:
            for cleanup in self._cleanups:
                with contextlib.suppress(OSError):
                    cleanup()
        finally:
            self._end(KILLED_EXIT_CODE + number)
