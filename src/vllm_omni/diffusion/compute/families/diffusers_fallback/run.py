"""A function that runs in a thread of its own and stands still at its pauses until it is told to go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class _CancelledError(BaseException):
    """Unwinds a run that nobody waits for; no `except Exception` on the way keeps it."""


class SteppedRun(Generic[Result]):
    """Either the caller of `resume` runs or the function, never both: they take turns, as coroutines do."""

    def __init__(self, function: Callable[[Callable[[], None]], Result]) -> None:
        """`function` is given what pauses it. It begins at the first `resume`."""
        self._function = function
        self._run_may_go = threading.Semaphore(0)
        self._caller_may_go = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True, name="pipeline-run")
        self._is_cancelled = False
        self._error: Exception | None = None
        self._results: list[Result] = []

    @property
    def is_alive(self) -> bool:
        """Begun and not ended."""
        return self._thread.is_alive()

    def resume(self) -> bool:
        """Let the function run to its next pause (True) or to its end (False; also when it has ended before).

        Raises what the function raises.
        """
        if not self._results and self._error is None:
            if self._thread.ident is None:
                self._thread.start()
            self._run_may_go.release()
            self._caller_may_go.acquire()
        if self._error is not None:
            raise self._error
        return not self._results

    def result(self) -> Result:
        """What the function returns; runs it to its end. Raises what it raises."""
        while self.resume():
            pass
        return self._results[0]

    def cancel(self) -> None:
        """End the function at its pause; what it holds is free when this returns. Nothing happens once it has ended."""
        self._is_cancelled = True
        if self._thread.ident is not None:
            self._run_may_go.release()
            self._thread.join()

    def _run(self) -> None:
        self._run_may_go.acquire()
        try:
            if not self._is_cancelled:
                self._results.append(self._function(self._pause))
        except Exception as error:
            self._error = error  # the caller's, whatever it is
        except _CancelledError:
            pass
        self._caller_may_go.release()

    def _pause(self) -> None:
        if not self._is_cancelled:  # a run that unwinds may come here again, and nobody would let it go on
            self._caller_may_go.release()
            self._run_may_go.acquire()
        if self._is_cancelled:
            raise _CancelledError
