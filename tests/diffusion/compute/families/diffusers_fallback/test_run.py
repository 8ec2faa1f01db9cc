"""A run and its caller take turns, and a run that nobody waits for ends."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from testbed.patience import GUARD_SECONDS
from vllm_omni.diffusion.compute.families.diffusers_fallback.run import SteppedRun


def test_a_run_stands_still_at_its_pauses() -> None:
    seen: list[str] = []

    def function(pause: Callable[[], None]) -> str:
        for name in ("first", "second"):
            seen.append(name)
            pause()
        return "result"

    run = SteppedRun(function)
    assert not seen
    assert run.resume()
    assert seen == ["first"]
    assert run.resume()
    assert seen == ["first", "second"]
    assert not run.resume()
    assert not run.resume()  # it has ended
    assert run.result() == "result"
    assert not run.is_alive


def test_an_error_is_raised_where_the_run_is_resumed() -> None:
    def function(pause: Callable[[], None]) -> None:
        pause()
        raise KeyError("broken")

    run = SteppedRun(function)
    assert run.resume()
    for _ in range(2):
        with pytest.raises(KeyError, match="broken"):
            run.resume()
    run.cancel()
    assert not run.is_alive


def test_a_cancelled_run_unwinds_at_its_pause() -> None:
    seen: list[str] = []

    def function(pause: Callable[[], None]) -> None:
        try:
            try:
                pause()
                seen.append("went on")
            except Exception:
                seen.append("kept")
        finally:
            seen.append("cleaned")

    run = SteppedRun(function)
    run.resume()
    run.cancel()
    assert seen == ["cleaned"]
    assert not run.is_alive


def test_a_run_that_pauses_while_it_unwinds_ends() -> None:
    seen: list[str] = []

    def function(pause: Callable[[], None]) -> None:
        try:
            pause()
        finally:
            seen.append("unwinding")
            pause()
            seen.append("went on")

    run = SteppedRun(function)
    run.resume()
    cancelling = threading.Thread(target=run.cancel, daemon=True)
    cancelling.start()
    cancelling.join(GUARD_SECONDS)
    assert not cancelling.is_alive(), "waits for ever"
    assert seen == ["unwinding"]
    assert not run.is_alive


def test_a_run_that_never_began_is_cancelled() -> None:
    run = SteppedRun(lambda pause: None)
    run.cancel()
    assert not run.is_alive
