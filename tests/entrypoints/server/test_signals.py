"""SIGTERM and SIGINT before, at and after the first signal."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any, NoReturn

import pytest

from vllm_omni.entrypoints.cli import main as command
from vllm_omni.entrypoints.server.signals import StopSignals
from vllm_omni.logs import QueuedStreams


class EndedError(Exception):
    """Replacement of the end of the process."""


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nobody_listens_yet(number: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    codes: list[int] = []
    with StopSignals(codes.append):
        send(number)
    assert codes == [128 + number]
    assert caplog.messages == [f"{signal.Signals(number).name}: ending at once"]


def test_the_first_asks_and_all_others_end() -> None:
    told: list[Any] = []
    with StopSignals(told.append) as signals:
        signals.on_first(told.append)
        signals.before_end(lambda: told.append("cleaned up"))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            send(number)
    assert told == ["SIGINT", "cleaned up", 128 + 15, "cleaned up", 128 + 2]


def test_a_failing_cleanup_does_not_hold_up_the_end() -> None:
    told: list[Any] = []

    def fail() -> NoReturn:
        raise PermissionError("the socket's folder")

    with StopSignals(told.append) as signals:
        signals.before_end(fail)
        signals.before_end(lambda: told.append("cleaned up"))
        send(signal.SIGTERM)
    assert told == ["cleaned up", 128 + 15]


def test_a_lock_that_is_waited_for_is_no_obstacle() -> None:
    def end(code: int) -> NoReturn:
        raise EndedError(code)

    lock = threading.Lock()
    with StopSignals(end), lock:
        sender = threading.Timer(0.05, send, [signal.SIGTERM])
        sender.start()
        with pytest.raises(EndedError, match="143"):
            lock.acquire()
        sender.join()


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals(lambda code: None):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_command_ends_at_once_while_it_still_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(self: QueuedStreams, code: int) -> NoReturn:
        raise EndedError(code)

    monkeypatch.setattr(QueuedStreams, "leave", leave)
    monkeypatch.setattr(command, "parse_args", lambda *_: send(signal.SIGTERM))
    with pytest.raises(EndedError, match="143"):
        command.main(["serve", "demo"])
