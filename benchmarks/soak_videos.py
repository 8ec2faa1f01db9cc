"""Soak of video jobs: two servers on one store, of which one is killed again and again, and a check of their promises.

    python -m benchmarks.soak_videos
    python -m benchmarks.soak_videos --jobs 1000 --clients 16 --fault-every 20

Starts two `vllm serve demo-video --omni` on one SQLite file and one folder, and makes a few videos without load. Then
the clients make short jobs at both servers, watch them, fetch the videos, and delete some of them early. Every
`--fault-every` seconds one process is killed (SIGKILL): in turns a worker of the first server, the second server, which
is started again, and a worker of the second server. Prints one table, and exits with an error if a promise is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.served import ServedModel
from benchmarks.soak import report, signal_a_worker, usage_of
from benchmarks.soak_promises import Promise
from benchmarks.soak_videos_load import Fleet, VideoTally, calm_videos, list_all, play_client
from benchmarks.soak_videos_promises import StoredJobs, VideoEvidence, judge_videos, read_stored

MODEL = "demo-video"
JOB_STORE, MEDIA_STORE = "jobs.sqlite", "media"
SETTLE_SECONDS = 180.0
"""Limit of the time, after the load, in which remaining jobs end and the files of deleted jobs are removed."""
LOOK_SECONDS = 0.5


@dataclass
class Servers:
    """Two servers of one store: the first one stays, the second one is killed and started again."""

    folder: Path
    flags: Sequence[str]
    started: list[ServedModel] = field(default_factory=list)

    def start(self) -> ServedModel:
        stores = (
            "--job-store",
            f"sqlite:///{self.folder / JOB_STORE}",
            "--media-store",
            str(self.folder / MEDIA_STORE),
        )
        limits = ("--max-worker-restarts", "100000", "--uvicorn-log-level", "warning")
        log = self.folder / f"server-{len(self.started)}.log"
        self.started.append(ServedModel(MODEL, (*stores, *limits, *self.flags), log))
        return self.started[-1]

    def kill_all(self) -> None:
        for server in self.started:
            server.kill()

    @property
    def log(self) -> str:
        """Output of all servers."""
        logs = sorted(self.folder.glob("server-*.log"))
        return "".join(log.read_text(errors="replace") for log in logs)

    def stored(self) -> StoredJobs:
        return read_stored(self.folder / JOB_STORE, self.folder / MEDIA_STORE)


class Faults:
    """Kills processes of the servers, one every so many seconds."""

    def __init__(self, servers: Servers, first: ServedModel, second: ServedModel, fleet: Fleet) -> None:
        self._servers = servers
        self._first = first
        self.second = second
        self._fleet = fleet
        self.num_crashes = 0
        self.num_worker_kills = 0
        self.num_survivors = 0

    async def send(self, every: float, rng: random.Random, client: httpx.AsyncClient, over: asyncio.Event) -> None:
        """Kill until the load is `over`. `client`: that of the second server."""
        for kind in itertools.cycle(("first", "crash", "second")):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), every)
                return
            if kind == "crash":
                client = await self._crash(client)
            else:
                server = self._first if kind == "first" else self.second
                await signal_a_worker(server, signal.SIGKILL, rng)
                self.num_worker_kills += 1

    async def _crash(self, client: httpx.AsyncClient) -> httpx.AsyncClient:
        await asyncio.to_thread(self.second.crash)
        self.num_crashes += 1
        await self._fleet.remove(client)
        self.num_survivors += await asyncio.to_thread(self.second.survivors)
        self.second = self._servers.start()
        url = await asyncio.to_thread(self.second.wait_until_ready)
        return self._fleet.add(url)


async def run_load(
    args: argparse.Namespace, servers: Servers, first: ServedModel, second: ServedModel
) -> tuple[VideoEvidence, ServedModel, int]:
    """The evidence, the second server as it runs now, and the number of processes that outlived a killed server."""
    rngs = [random.Random(args.seed + number) for number in range(args.clients + 2)]
    fleet, tally, jobs = Fleet(rngs[0]), VideoTally(), list(range(args.jobs))
    fleet.add(await asyncio.to_thread(first.wait_until_ready))
    second_client = fleet.add(await asyncio.to_thread(second.wait_until_ready))
    faults = Faults(servers, first, second, fleet)
    try:
        calm = await calm_videos(second_client)
        # Each server has made everything that it makes once, such as threads, before its usage is noted.
        await play_client(fleet, rngs[0], calm, warm := VideoTally(), [0] * args.clients, 0.5)
        usage = await usage_of(first)
        over = asyncio.Event()
        playing = [play_client(fleet, rng, calm, tally, jobs, args.deletes) for rng in rngs[2:]]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(faults.send(args.fault_every, rngs[1], second_client, over))
            await asyncio.gather(*playing)
            over.set()
        listed = await settle(fleet, servers, tally)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        await fleet.aclose()
    listed = {job_id: video for job_id, video in listed.items() if job_id not in warm.completed}
    usages = usage, await usage_of(first)
    evidence = VideoEvidence(
        tally, args.jobs, listed, servers.stored(), faults.num_crashes, faults.num_worker_kills, usages
    )
    return evidence, faults.second, faults.num_survivors


async def settle(fleet: Fleet, servers: Servers, tally: VideoTally) -> dict[str, dict[str, object]]:
    """Wait until all jobs have ended and the files of deleted ones are removed, or until SETTLE_SECONDS are over."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        listed, stored = await list_all(fleet, tally), servers.stored()
        has_ended = all(video["status"] in ("completed", "failed") for video in listed.values())
        is_clean = stored.rows.keys() == listed.keys() and stored.files == stored.named
        if (has_ended and is_clean) or time.monotonic() > deadline:
            return listed
        await asyncio.sleep(LOOK_SECONDS)


def soak(args: argparse.Namespace) -> list[Promise]:
    args.out.mkdir(parents=True, exist_ok=True)
    for old in (*args.out.glob("server-*.log"), *args.out.glob(f"{JOB_STORE}*")):
        old.unlink()
    servers = Servers(args.out.absolute(), args.flags)
    try:
        first, second = servers.start(), servers.start()
        evidence, second, survivors = asyncio.run(run_load(args, servers, first, second))
        codes = [server.stop() for server in (first, second)]
        survivors += first.survivors() + second.survivors()
    finally:
        servers.kill_all()
    return judge_videos(evidence, servers.log, codes, survivors, args.least_psnr, args.most_megabytes)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--deletes", type=float, default=0.25, help="share of the jobs that are deleted early")
    parser.add_argument("--fault-every", type=float, default=10.0, help="seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    # A lossy file enlarges differences in the last bit; a video of another seed has less than 20 dB.
    parser.add_argument("--least-psnr", type=float, default=35.0, help="dB of decoded frames to those of the calm")
    parser.add_argument("--most-megabytes", type=float, default=64.0, help="by which the first server may grow")
    parser.add_argument("--out", type=Path, default=Path("out/soak_videos"), help="folder for the store and the logs")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG ...", help="further flags of the servers")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        promises = soak(args)
    except (httpx.HTTPError, RuntimeError, subprocess.TimeoutExpired) as error:
        sys.exit(f"a server is gone, or does not end: {type(error).__name__}: {error}; see {args.out}")
    report(promises, f"the servers' logs: {args.out}/server-*.log")


if __name__ == "__main__":
    main()
