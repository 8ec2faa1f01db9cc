"""A server under mixed load while its workers are killed and stopped: does it keep its promises?

    python -m benchmarks.soak
    python -m benchmarks.soak --seconds 3600 --clients 16 -- --data-parallel-size 2

Starts `vllm serve demo --omni` and draws a few pictures in a calm. For `--seconds` clients then ask for the same ones
in every way: alone, several at once, as streams, in chats, by URL. Some clients leave early, some send bad requests.
A worker is killed (SIGKILL) every `--fault-every` seconds, and one is stopped (SIGSTOP). Prints one table, and exits
with an error when a promise is broken. What follows `--` are further flags of the server.
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
"""Every fault is a worker's death; the default allows three in ten minutes."""
PATIENCE_SECONDS = 600.0
"""Longest time from a fault to fresh workers, and from the last answer to an idle server."""
REQUEST_SECONDS = 900.0
LOOK_SECONDS = 0.1
MAX_DETAILS = 5
"""Answers that break a promise of which the text is printed."""
NUM_USAGES = 20
"""Looks at what the server holds, LOOK_SECONDS apart."""


@dataclass(frozen=True)
class Fault:
    """A signal for a worker."""

    at: float
    """Seconds after the load's begin."""
    number: signal.Signals


def plan_faults(seconds: float, every: float) -> list[Fault]:
    """A kill every so many seconds, and between the first two of them a stop; none where the load ends."""
    kills = [Fault(every * n, signal.SIGKILL) for n in range(1, math.ceil(seconds / every))]
    stop = Fault(1.5 * every, signal.SIGSTOP)
    return sorted([*kills, *([stop] if stop.at < seconds else [])], key=lambda fault: fault.at)


async def send_faults(
    faults: Sequence[Fault], server: ServedModel, client: httpx.AsyncClient, rng: random.Random
) -> list[float]:
    """Signal a worker at each fault's time; by fault, the seconds until the server ran with fresh workers.

    A fault that is due before what the last one held up has ended waits for that: a request that sees workers die for
    the third time is failed, as promised. After a fault from which the server does not recover there are no more.
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
    """Signal one of the workers that live.

    Waits for one where all have just died, and chooses again where the chosen one ends meanwhile. Raises RuntimeError
    when there is none in `patience_seconds`.
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
    """Whether twice as many requests have ended as were under way: an old one is not overtaken for ever."""
    return now.ended - before.ended >= 2 * before.under_way


async def seconds_until(client: httpx.AsyncClient, condition: Callable[[Counts], bool]) -> float:
    """Seconds until the server's counts meet a condition; infinite when they do not in PATIENCE_SECONDS."""
    start = time.monotonic()
    while not condition(await read_counts(client)):
        if time.monotonic() - start > PATIENCE_SECONDS:
            return math.inf
        await asyncio.sleep(LOOK_SECONDS)
    return time.monotonic() - start


async def until_idle(client: httpx.AsyncClient) -> None:
    """Until the requests of clients that left have ended, too; what has not ended then shows in the counts."""
    await seconds_until(client, lambda counts: not counts.under_way)


async def usage_of(server: ServedModel) -> Usage:
    """Memory, descriptors and processes of the server, once it has noticed that its clients have gone."""
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
        await ask_in_every_way(client, calm, tally)  # what a server makes once, threads for one, it has made then
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
    """A client that opens as many connections as it is asked to."""
    return httpx.AsyncClient(base_url=url, timeout=REQUEST_SECONDS, limits=httpx.Limits(max_connections=None))


def soak(args: argparse.Namespace) -> list[Promise]:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with served_model(args.model, (*FLAGS, *args.flags), args.out) as server:
        url = server.wait_until_ready()
        evidence = asyncio.run(run_load(args, server, url))
        code = server.stop()
        return judge(evidence, server.log, code, server.survivors(), args.least_psnr, args.most_megabytes)


def print_table(promises: Sequence[Promise]) -> None:
    print(f"{'promise':<36}{'found':<32}{'allowed':<16}")
    for promise in promises:
        verdict = "" if promise.is_kept else "BROKEN"
        print(f"{promise.name:<36}{promise.found:<32}{promise.allowed:<16}{verdict}".rstrip())


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
    print_table(promises)
    if broken := [promise for promise in promises if not promise.is_kept]:
        names = ", ".join(promise.name for promise in broken)
        details = [detail for promise in broken for detail in promise.details[:MAX_DETAILS]]
        sys.exit("\n".join([f"broken promises: {names}; the server's log: {args.out}", *details]))


if __name__ == "__main__":
    main()
