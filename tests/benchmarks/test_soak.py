"""The soak: what its clients do and count, what it calls broken, and a minute of it."""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks.served import Usage
from benchmarks.soak import connected, main, plan_faults, until_idle
from benchmarks.soak_load import BAD_REQUESTS, CASES, WAYS, Tally, ask_in_every_way, calm_pictures, play_client
from benchmarks.soak_promises import Counts, Evidence, judge, read_counts

from benchmarks import soak, soak_load
from testbed.live_server import live_server

COUNTS = Counts(success=12, failed=0, aborted=3, invalid=4, turned_away=0, restarts=2, replayed=5, under_way=0)
TALLY = Tally(answered=8, pictures=10, worst_psnr=80.0, seconds=[0.5], left=5, refused=Counter({400: 4, 404: 1}))
USAGE = Usage(megabytes=500.0, descriptors=30, processes=2)
NOTHING = Counts(0, 0, 0, 0, 0, 0, 0, 0)
EVIDENCE = Evidence(TALLY, NOTHING, COUNTS, (USAGE, USAGE), num_faults=2, healed=(5.0, 15.0), health=200)


def broken(evidence: Evidence = EVIDENCE, log: str = "all is well\n", code: int = 0, survivors: int = 0) -> list[str]:
    return [p.name for p in judge(evidence, log, code, survivors, 60.0, 64.0) if not p.is_kept]


def test_a_run_without_a_fault_breaks_no_promise() -> None:
    assert broken() == []
    idle_clients = replace(EVIDENCE, after=replace(COUNTS, success=10, aborted=0))
    assert broken(idle_clients) == [], "requests of clients that left may never have arrived"


@pytest.mark.parametrize(
    ("changes", "promise"),
    [
        ({"answered": 0}, "good requests get their pictures"),
        ({"worst_psnr": 59.9}, "pictures are those of the calm"),
        ({"worst_psnr": math.nan}, "pictures are those of the calm"),
        ({"faults": ["503"]}, "answers are as they should be"),
    ],
)
def test_a_wrong_answer_breaks_a_promise(changes: dict[str, Any], promise: str) -> None:
    assert broken(replace(EVIDENCE, tally=replace(TALLY, **changes))) == [promise]


@pytest.mark.parametrize(
    ("changes", "promises"),
    [
        ({"restarts": 1}, ["dead workers are replaced"]),
        ({"restarts": 3}, ["dead workers are replaced"]),
        ({"under_way": 1}, ["requests of clients that left end"]),
        ({"success": 9}, ["metrics: pictures delivered"]),
        ({"success": 16, "aborted": 0}, ["metrics: pictures delivered", "metrics: pictures that ended"]),
        ({"aborted": 4}, ["metrics: pictures that ended"]),
        ({"failed": 1, "aborted": 2}, ["metrics: failed or turned away"]),
        ({"turned_away": 1}, ["metrics: failed or turned away"]),
        ({"invalid": 5}, ["metrics: refused as invalid"]),
        ({"invalid": 3}, ["metrics: refused as invalid"]),
    ],
)
def test_metrics_that_differ_from_the_clients_count_break_a_promise(
    changes: dict[str, int], promises: list[str]
) -> None:
    assert broken(replace(EVIDENCE, after=replace(COUNTS, **changes))) == promises


@pytest.mark.parametrize(
    ("changes", "promise"),
    [
        ({"megabytes": 565.0}, "memory does not grow"),
        ({"descriptors": 39}, "descriptors do not grow"),
        ({"processes": 3}, "no process is left over"),
    ],
)
def test_what_a_server_keeps_breaks_a_promise(changes: dict[str, Any], promise: str) -> None:
    assert broken(replace(EVIDENCE, usages=(USAGE, replace(USAGE, **changes)))) == [promise]


def test_a_server_in_disorder_breaks_promises() -> None:
    assert broken(replace(EVIDENCE, health=503)) == ["the server is healthy again"]
    assert broken(replace(EVIDENCE, healed=(5.0, math.inf))) == ["dead workers are replaced"]
    assert broken(log="INFO\nTraceback (most recent call last):\n") == ["the log has no traceback"]
    assert broken(log="Task exception was never retrieved\n") == ["the log has no traceback"]
    assert broken(code=1) == broken(survivors=1) == ["SIGTERM ends the server"]


def test_a_broken_promise_is_an_error_that_says_what_was_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = replace(EVIDENCE, tally=replace(TALLY, faults=["a 503", "a 500"]))
    monkeypatch.setattr(soak, "soak", lambda args: judge(seen, "", 0, 0, 60.0, 64.0))
    with pytest.raises(SystemExit) as ended:
        main([])
    assert str(ended.value).splitlines() == [
        "broken promises: answers are as they should be; the server's log: out/soak.log",
        "a 503",
        "a 500",
    ]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("answers")] == ["BROKEN"]
    assert sum("BROKEN" in line for line in lines) == 1


def test_a_worker_is_killed_every_minute_and_one_is_stopped() -> None:
    plan = [(fault.at, fault.number) for fault in plan_faults(270.0, 60.0)]
    kill, stop = signal.SIGKILL, signal.SIGSTOP
    assert plan == [(60.0, kill), (90.0, stop), (120.0, kill), (180.0, kill), (240.0, kill)]
    assert plan_faults(60.0, 60.0) == []


async def test_a_fault_waits_for_a_worker_that_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """At first none does; the first one that does has ended when it is signalled."""
    looks = [[], [2], [], [3]]
    signals = []

    def kill(pid: int, number: int) -> None:
        if pid == 2:
            raise ProcessLookupError
        signals.append((pid, number))

    monkeypatch.setattr(os, "kill", kill)
    server: Any = SimpleNamespace(workers=lambda: [SimpleNamespace(pid=pid) for pid in looks.pop(0)])
    await soak.signal_a_worker(server, signal.SIGSTOP, random.Random(0))
    assert (signals, looks) == ([(3, signal.SIGSTOP)], [])
    with pytest.raises(RuntimeError, match="no worker lives, and none was started in 0 s"):
        await soak.signal_a_worker(server, signal.SIGSTOP, random.Random(0), patience_seconds=0.0)


async def test_clients_are_answered_in_every_way_and_count_what_they_see() -> None:
    tally, over = Tally(), asyncio.Event()
    with live_server() as server:
        async with connected(server.url) as client:
            calm = await calm_pictures(client, CASES[:3])
            before = await read_counts(client)
            await ask_in_every_way(client, calm, tally)
            playing = [asyncio.create_task(play_client(client, random.Random(n), calm, tally, over)) for n in range(3)]
            while tally.answered < 2 * len(WAYS) * 3:  # noqa: ASYNC110 (a tally has no event for it)
                await asyncio.sleep(0.01)
            over.set()
            await asyncio.gather(*playing)
            await until_idle(client)
            after = await read_counts(client)
    assert tally.faults == []
    assert tally.worst_psnr == math.inf
    assert tally.refused.total() >= len(BAD_REQUESTS)
    assert tally.left >= 1
    evidence = Evidence(tally, before, after, (USAGE, USAGE), num_faults=0, healed=(), health=200)
    assert broken(evidence) == []


async def test_a_picture_that_is_another_one_is_seen() -> None:
    case = CASES[0]
    tally = Tally()
    with live_server() as server:
        async with connected(server.url) as client:
            wanted = {case: await soak_load.plain(client, replace(case, seed=case.seed + 1))}
            for way in WAYS:
                await soak_load.send_good(client, way, case, wanted, tally)
            await soak_load.send_good(client, soak_load.plain, replace(case, size="63x64"), wanted, tally)
    assert tally.worst_psnr < 20
    (fault,) = tally.faults
    assert "400" in fault


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_minute(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--seconds", "60", "--fault-every", "25", "--clients", "4", "--out", str(tmp_path / "server.log")])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "BROKEN" in line] == []
    (replaced,) = [line for line in lines if line.startswith("dead workers are replaced")]
    assert replaced.split()[-1] == "3"
