"""Soak: a server under mixed load while its workers are killed and stopped, and a check of its promises.

    python -m benchmarks.soak
    python -m benchmarks.soak --seconds 3600 --clients 16 -- --data-parallel-size 2

Starts `vllm serve demo --omni` and draws a few pictures without load. Then, for `--seconds`, clients ask for the same
pictures in every way: alone, several at once, as streams, in chats, by URL. Some clients leave early, some send bad
requests. A worker is killed (SIGKILL) every `--fault-every` seconds, and one is stopped (SIGSTOP). Prints one table,
and exits with an error if a promise is broken. Words after `--` are further flags of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

from benchmarks.served import ServedModel, Usage, served_model
from benchmarks.soak_load import Tally, ask_in_every_way, calm_pictures, play_client
from benchmarks.soak_promises import Counts, Evidence, Promise, judge, read_counts

FLAGS = ("--max-worker-restarts", "100000", "--uvicorn-log-level", "warning")
"""Flags of the server; every fault is a worker's death, and the default allows three in ten minutes."""
PATIENCE_SECONDS = 600.0
"""Limit from a fault to new workers, and from the last response to an idle server."""
REQUEST_SECONDS = 900.0
LOOK_SECONDS = 0.1
MAX_DETAILS = 5
"""Most broken responses whose text is printed."""
NUM_USAGES = 20
"""Number of samples of the server's usage, LOOK_SECONDS apart."""


@dataclass(frozen=True)
class Fault:
    """Signal to send to a worker."""

    at: float
    """Time in seconds after the load's start."""
    number: signal.Signals


def plan_faults(seconds: float, every: float) -> list[Fault]:
    """Plan a kill every so many seconds, and a stop between the first two; none near the load's end."""
    kills = [Fault(every * n, signal.SIGKILL) for n in range(1, math.ceil(seconds / every))]
    stop = Fault(1.5 * every, signal.SIGSTOP)
    return sorted([*kills, *([stop] if stop.at < seconds else [])], key=lambda fault: fault.at)


async def send_faults(
    faults: Sequence[Fault], server: ServedModel, client: httpx.AsyncClient, rng: random.Random
) -> list[float]:
    """Signal a worker at each fault's time; return the seconds until new workers ran, by fault.

    A fault waits until the requests that the last one delayed have ended, because a request fails, as documented, when
    workers die for the third time. After a fault from which the server does not recover there are no more.
    """
    start = time.monotonic()
    seconds = []
    for fault in faults:
        await asyncio.sleep(max(0.0, start + fault.at - time.monotonic()))
        before = await read_counts(client)
        await signal_a_worker(server, fault.number, rng)
        seconds.append(await seconds_until(client, partial(_runs_again, before)))
        if math.inf in (seconds[-1], await seconds_until(client, partial(_has_caught_up, before))):
            break
    return seconds


async def signal_a_worker(
    server: ServedModel, number: int, rng: random.Random, patience_seconds: float = PATIENCE_SECONDS
) -> None:
    """Signal one of the running workers.

    Waits if all have just died, and chooses again if the chosen one has ended meanwhile. Raises RuntimeError after
    `patience_seconds` without a worker.
    """
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        if workers := server.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(workers).pid, number)
                return
        await asyncio.sleep(LOOK_SECONDS)
    raise RuntimeError(f"no worker lives, and none was started in {patience_seconds:g} s")


def _runs_again(before: Counts, now: Counts) -> bool:
    return now.restarts > before.restarts


def _has_caught_up(before: Counts, now: Counts) -> bool:
    """Whether twice as many requests have ended as ran before: ageing keeps the old ones from waiting longer."""
    return now.ended - before.ended >= 2 * before.under_way


async def seconds_until(client: httpx.AsyncClient, condition: Callable[[Counts], bool]) -> float:
    """Seconds until the server's counts meet a condition; infinite after PATIENCE_SECONDS."""
    start = time.monotonic()
    while not condition(await read_counts(client)):
        if time.monotonic() - start > PATIENCE_SECONDS:
            return math.inf
        await asyncio.sleep(LOOK_SECONDS)
    return time.monotonic() - start


async def until_idle(client: httpx.AsyncClient) -> None:
    """Wait until the requests of clients that left have ended; the counts show those that have not."""
    await seconds_until(client, lambda counts: not counts.under_way)


async def usage_of(server: ServedModel) -> Usage:
    """Memory, descriptors and processes of the server, after it has noticed that its clients are gone."""
    usages = []
    for _ in range(NUM_USAGES):
        usages.append(server.usage())
        await asyncio.sleep(LOOK_SECONDS)
    return min(usages, key=lambda usage: usage.descriptors)


async def run_load(args: argparse.Namespace, server: ServedModel, url: str) -> Evidence:
    tally = Tally()
    rngs = [random.Random(args.seed + n) for n in range(args.clients + 1)]
    async with connected(url) as client:
        calm = await calm_pictures(client)
        before = await read_counts(client)
        await ask_in_every_way(
            client, calm, tally
        )  # then the server has made everything that it makes once, such as threads
        await until_idle(client)
    usage = await usage_of(server)
    async with connected(url) as client:
        over = asyncio.Event()
        clients = [asyncio.create_task(play_client(client, rng, calm, tally, over)) for rng in rngs[1:]]
        rest = asyncio.create_task(asyncio.sleep(args.seconds))
        faults = plan_faults(args.seconds, args.fault_every)
        healed = await send_faults(faults, server, client, rngs[0])
        await rest
        over.set()
        await asyncio.gather(*clients)
        await until_idle(client)
        health = (await client.get("/health")).status_code
        after = await read_counts(client)
    return Evidence(tally, before, after, (usage, await usage_of(server)), len(faults), healed, health)


def connected(url: str) -> httpx.AsyncClient:
    """Client without a limit of connections."""
    return httpx.AsyncClient(base_url=url, timeout=REQUEST_SECONDS, limits=httpx.Limits(max_connections=None))


def soak(args: argparse.Namespace) -> list[Promise]:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with served_model(args.model, (*FLAGS, *args.flags), args.out) as server:
        url = server.wait_until_ready()
        evidence = asyncio.run(run_load(args, server, url))
        code = server.stop()
        return judge(evidence, server.log, code, server.survivors(), args.least_psnr, args.most_megabytes)


def report(promises: Sequence[Promise], logs: str) -> None:
    """Print the table. Raises SystemExit, with what was seen and where the `logs` are, for a broken promise."""
    print(f"{'promise':<36}{'found':<32}{'allowed':<16}")
    for promise in promises:
        verdict = "" if promise.is_kept else "BROKEN"
        print(f"{promise.name:<36}{promise.found:<32}{promise.allowed:<16}{verdict}".rstrip())
    if broken := [promise for promise in promises if not promise.is_kept]:
        names = ", ".join(promise.name for promise in broken)
        details = [detail for promise in broken for detail in promise.details[:MAX_DETAILS]]
        sys.exit("\n".join([f"broken promises: {names}; {logs}", *details]))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seconds", type=float, default=270.0, help="of load")
    parser.add_argument("--fault-every", type=float, default=60.0, help="seconds between two kills of a worker")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least-psnr", type=float, default=60.0, help="dB to the picture drawn in the calm")
    parser.add_argument("--most-megabytes", type=float, default=64.0, help="by which the server may grow")
    parser.add_argument("--out", type=Path, default=Path("out/soak.log"), help="the server's log")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG ...", help="further flags of the server")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        promises = soak(args)
    except (httpx.HTTPError, RuntimeError, subprocess.TimeoutExpired) as error:
        sys.exit(f"the server is gone, or does not end: {type(error).__name__}: {error}; see {args.out}")
    report(promises, f"the server's log: {args.out}")


if __name__ == "__main__":
    main()
