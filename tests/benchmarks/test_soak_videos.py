"""The soak of video jobs: what it calls broken, and a run with two servers that lose processes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.served import Usage
from benchmarks.soak_videos import main
from benchmarks.soak_videos_load import VideoTally
from benchmarks.soak_videos_promises import StoredJobs, VideoEvidence, judge_videos

DONE = {"status": "completed", "completed_at": 7, "seed": 1, "progress": 100}
TALLY = VideoTally(completed={"a": DONE, "b": DONE}, deleted={"c"}, num_unanswered=1, worst_psnr=60.0, seconds=[1.0])
FILES = frozenset({"a/1/video.mp4", "b/1/video.mp4"})
USAGE = Usage(megabytes=500.0, descriptors=30, processes=2)
EVIDENCE = VideoEvidence(
    TALLY,
    num_jobs=3,
    listed={"a": DONE, "b": DONE},
    stored=StoredJobs({"a": "completed", "b": "completed"}, FILES, FILES),
    num_crashes=1,
    num_worker_kills=2,
    usages=(USAGE, USAGE),
)


def broken(evidence: VideoEvidence = EVIDENCE, codes: tuple[int, ...] = (0, 0), survivors: int = 0) -> list[str]:
    return [p.name for p in judge_videos(evidence, "all is well\n", codes, survivors, 40.0, 64.0) if not p.is_kept]


def test_a_run_without_a_fault_breaks_no_promise() -> None:
    assert broken() == []
    assert broken(replace(EVIDENCE, listed={"a": DONE, "b": DONE, "x": DONE})) == [], "its answer was lost"


@pytest.mark.parametrize(
    ("changes", "promise"),
    [
        ({"deleted": set()}, "every job ends"),
        ({"failed": {"c": "lost"}, "deleted": set()}, "no job fails"),
        ({"worst_psnr": 39.0}, "frames are those of the calm"),
        ({"worst_psnr": math.nan}, "frames are those of the calm"),
        ({"faults": ["500"]}, "answers are as they should be"),
        ({"deleted": {"a"}}, "deleted jobs stay deleted"),
    ],
)
def test_what_clients_see_breaks_a_promise(changes: dict[str, Any], promise: str) -> None:
    assert broken(replace(EVIDENCE, tally=replace(TALLY, **changes))) == [promise]


@pytest.mark.parametrize(
    ("listed", "promises"),
    [
        ({"a": DONE, "b": DONE, "x": {**DONE, "status": "in_progress"}}, ["every job ends"]),
        ({"a": DONE, "b": {**DONE, "completed_at": 8}}, ["a job ends once"]),
        ({"a": DONE}, ["a job ends once"]),
        ({"a": DONE, "b": DONE, "x": DONE, "y": DONE}, ["jobs whose client knows no id"]),
    ],
)
def test_what_servers_list_breaks_promises(listed: dict[str, Any], promises: list[str]) -> None:
    assert broken(replace(EVIDENCE, listed=listed)) == promises


@pytest.mark.parametrize(
    ("stored", "promise"),
    [
        (StoredJobs({"a": "deleting"}, FILES, FILES), "rows that are half made or deleted"),
        (StoredJobs({}, FILES, FILES | {"c/1/video.mp4"}), "files are those of the rows"),
        (StoredJobs({}, FILES, FILES - {"a/1/video.mp4"}), "files are those of the rows"),
    ],
)
def test_a_store_in_disorder_breaks_a_promise(stored: StoredJobs, promise: str) -> None:
    assert broken(replace(EVIDENCE, stored=stored)) == [promise]


def test_servers_in_disorder_break_promises() -> None:
    assert broken(codes=(0, -9)) == broken(survivors=1) == ["SIGTERM ends the server"]
    grown = (USAGE, replace(USAGE, megabytes=600.0))
    assert broken(replace(EVIDENCE, usages=grown)) == ["memory does not grow"]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_forty_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--jobs", "40", "--clients", "4", "--fault-every", "8", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "BROKEN" in line] == []
    (killed,) = [line for line in lines if line.startswith("servers and workers killed")]
    assert int(killed.split()[-3]) >= 1, "a server was killed"
