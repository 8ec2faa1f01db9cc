"""Promises of video jobs under a soak: every job ends once, and the files of the store are those of its rows."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.served import Usage
from benchmarks.soak_promises import Promise, process_promises, usage_promises
from benchmarks.soak_videos_load import VideoTally


@dataclass(frozen=True)
class StoredJobs:
    """Rows and files of the store."""

    rows: Mapping[str, str]
    """Job id -> its status, or its stage if the row is invisible."""
    named: frozenset[str]
    """Keys of the files that the rows name."""
    files: frozenset[str]
    """Keys of the files that are there."""


def read_stored(job_store: Path, media: Path) -> StoredJobs:
    """Read the SQLite file and the folder of a store."""
    with closing(sqlite3.connect(f"file:{job_store}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT id, stage, status, inputs, outputs, checkpoint FROM video_jobs").fetchall()
    statuses, named = {}, set()
    for job_id, stage, status, inputs, outputs, checkpoint in rows:
        statuses[job_id] = status if stage in ("live", "ended") else stage
        named |= {*json.loads(inputs), *json.loads(outputs).values(), *([checkpoint] if checkpoint else [])}
    files = {str(path.relative_to(media)) for path in media.rglob("*") if path.is_file()}
    return StoredJobs(statuses, frozenset(named), frozenset(files))


@dataclass(frozen=True)
class VideoEvidence:
    """Evidence from one run."""

    tally: VideoTally
    num_jobs: int
    """Number of jobs that the clients were to make."""
    listed: Mapping[str, Mapping[str, Any]]
    """Job id -> its video object at the end, from the list of a server."""
    stored: StoredJobs
    num_crashes: int
    """Servers that were killed and started again."""
    num_worker_kills: int
    usages: tuple[Usage, Usage]
    """Usage, before and after the load, of the server that was not killed."""


def judge_videos(
    evidence: VideoEvidence, log: str, exit_codes: Sequence[int], survivors: int, least_psnr: float, megabytes: float
) -> list[Promise]:
    """Check all promises. `log`: the output of all servers; `survivors`: number of processes that outlive them."""
    tally = evidence.tally
    median, late = np.percentile(tally.seconds, (50, 99)) if tally.seconds else (math.nan, math.nan)
    return [
        *_of_jobs(evidence),
        Promise("seconds to the end, p50 and p99", f"{median:.1f} s, {late:.1f} s", "", True),
        Promise(
            "frames are those of the calm",
            f"{tally.worst_psnr:.1f} dB",
            f"{least_psnr:g} dB",
            tally.worst_psnr >= least_psnr,
        ),
        Promise("answers are as they should be", f"{len(tally.faults)} are not", "0", not tally.faults, tally.faults),
        Promise("calls that were repeated", str(tally.num_repeated), "", True),
        Promise("servers and workers killed", f"{evidence.num_crashes} and {evidence.num_worker_kills}", "", True),
        *_of_files(evidence.stored),
        *usage_promises(*evidence.usages, megabytes),
        *process_promises(log, max(exit_codes, key=abs, default=0), survivors),
    ]


def _of_jobs(evidence: VideoEvidence) -> list[Promise]:
    tally, listed = evidence.tally, evidence.listed
    known = tally.completed.keys() | tally.failed.keys()
    unknown = listed.keys() - known
    live = [f"{job_id}: {video['status']}" for job_id, video in listed.items() if not _has_ended(video)]
    changed = [
        f"{job_id}: {first} became {listed.get(job_id)}"
        for job_id, first in tally.completed.items()
        if not _is_same(first, listed.get(job_id, {}))
    ]
    back = sorted(tally.deleted & listed.keys())
    return [
        Promise(
            "every job ends",
            f"{len(tally.completed)} done, {len(tally.deleted)} deleted",
            str(evidence.num_jobs),
            tally.num_ended == evidence.num_jobs and not live,
            live,
        ),
        Promise("no job fails", f"{len(tally.failed)} did", "0", not tally.failed, list(tally.failed.values())),
        Promise("a job ends once", f"{len(changed)} changed later", "0", not changed, changed),
        Promise("deleted jobs stay deleted", f"{len(back)} came back", "0", not back, back),
        Promise(
            "jobs whose client knows no id",
            str(len(unknown)),
            f"up to {tally.num_unanswered}",
            len(unknown) <= tally.num_unanswered,
            sorted(unknown),
        ),
    ]


def _has_ended(video: Mapping[str, Any]) -> bool:
    return video["status"] in ("completed", "failed")


def _is_same(first: Mapping[str, Any], last: Mapping[str, Any]) -> bool:
    return all(first[name] == last.get(name) for name in ("status", "completed_at", "seed", "progress"))


def _of_files(stored: StoredJobs) -> list[Promise]:
    orphans, missing = sorted(stored.files - stored.named), sorted(stored.named - stored.files)
    hidden = sorted(f"{job_id}: {state}" for job_id, state in stored.rows.items() if state in ("creating", "deleting"))
    return [
        Promise("rows that are half made or deleted", str(len(hidden)), "0", not hidden, hidden),
        Promise(
            "files are those of the rows",
            f"{len(stored.files)} of {len(stored.rows)} rows",
            f"{len(stored.named)}",
            not orphans and not missing,
            [*(f"no row names {key}" for key in orphans), *(f"{key} is missing" for key in missing)],
        ),
    ]
