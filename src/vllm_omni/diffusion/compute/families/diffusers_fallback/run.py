"""Functions that run in a thread of their own and wait at their pauses until they are resumed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Result = TypeVar("Result")


class _CancelledError(BaseException):
    """Unwinds a cancelled function; not an Exception, so that `except Exception` on the way does not stop it."""


class SteppedRun(Generic[Result]):
    """Function in a thread that takes turns with its caller, as a coroutine does: only one of them runs at a time."""

    def __init__(self, function: Callable[[Callable[[], None]], Result]) -> None:
        """function: called with a function that pauses it. It begins at the first `resume`."""
        self._function = function
        self._run_may_go = threading.Semaphore(0)
        self._caller_may_go = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True, name="pipeline-run")
        self._is_cancelled = False
        self._outcome: Future[Result] = Future()

    @property
    def is_alive(self) -> bool:
        """Whether the function has begun and not ended."""
        return self._thread.is_alive()

    def resume(self) -> bool:
        """Run the function to its next pause (True) or its end (False). Raises its exception."""
        if not self._outcome.done():
            if self._thread.ident is None:
                self._thread.start()
            self._run_may_go.release()
            self._caller_may_go.acquire()
        if self._outcome.done():
            self._outcome.result()
        return not self._outcome.done()

    def result(self) -> Result:
        """Run the function to its end. Returns its result, or raises its exception."""
        while self.resume():
            pass
        return self._outcome.result()

    def cancel(self) -> None:
        """End the function at its pause, and release what it holds. No effect on a function that has ended."""
        self._is_cancelled = True
        if self._thread.ident is not None:
            self._run_may_go.release()
            self._thread.join()

    def _run(self) -> None:
        self._run_may_go.acquire()
        try:
            if not self._is_cancelled:
                self._outcome.set_result(self._function(self._pause))
        except Exception as error:
            self._outcome.set_exception(error)
        except _CancelledError:
            pass
        self._caller_may_go.release()

    def _pause(self) -> None:
        if not self._is_cancelled:  # cleanup code of a cancelled function may pause again: nobody would resume it
            self._caller_may_go.release()
            self._run_may_go.acquire()
        if self._is_cancelled:
            raise _CancelledError
