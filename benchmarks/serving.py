"""Load on a running server, as clients see it: throughput, latency percentiles, stage times.

    python -m benchmarks.serving --base-url http://127.0.0.1:8000/v1 --concurrency 8 --num-requests 64
    python -m benchmarks.serving --rate 2 --sizes 64x64,96x128 --steps 4,20

`--concurrency N` is a closed loop: N clients, each sends after its last response. `--rate R` is an open loop: Poisson
arrivals, R per second, even if the server is slower. The workload is drawn from `--seed`.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from openai import APIError, AsyncOpenAI
from tqdm import tqdm

from benchmarks.workload import PERCENTILES, STAGES, Item, Outcome, draw_workload, play, summarise


async def send(client: AsyncOpenAI, model: str, item: Item, start: float) -> Outcome:
    sent = time.perf_counter() - start
    outcome = Outcome(item.index, item.kind, sent, sent)
    try:
        response = await client.images.generate(
            model=model,
            prompt=item.prompt,
            size=item.size,
            extra_body={"num_inference_steps": item.steps, "seed": item.seed},
        )
        outcome.timings = (response.model_extra or {}).get("timings", {})
    except APIError as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.done = time.perf_counter() - start
    return outcome


async def run_load(args: argparse.Namespace, items: Sequence[Item]) -> list[Outcome]:
    async with AsyncOpenAI(base_url=args.base_url, api_key=args.api_key, max_retries=0, timeout=args.timeout) as client:
        model = args.model or (await client.models.list()).data[0].id
        await send(client, model, items[0], time.perf_counter())  # warm-up of connection and caches, not counted
        bar = tqdm(total=len(items), unit="picture", file=sys.stderr)
        outcomes = await play(items, partial(send, client, model), args.concurrency, bar.update)
        bar.close()
        return outcomes


def print_table(summary: dict[str, Any]) -> None:
    columns = ["mean", *(f"p{p}" for p in PERCENTILES), *STAGES]
    print(f"{'seconds':<24}{'count':>6}" + "".join(f"{c:>12}" for c in columns))
    for name, row in [*summary["kinds"].items(), ("all", summary["all"])]:
        print(f"{name:<24}{row['count']:>6}" + "".join(f"{row.get(c, float('nan')):>12.3f}" for c in columns))
    print(
        f"{summary['num_requests']} requests, {summary['num_errors']} errors, {summary['seconds']:.1f} s, "
        f"{summary['pictures_per_second']:.2f} pictures/s"
    )


def plot(outcomes: Sequence[Outcome], summary: dict[str, Any], path: Path) -> None:
    """Plot each picture from sent to done, with its time in the queue in pale colour; and latencies by kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(summary["kinds"])
    colours = {kind: pyplot.get_cmap("tab10")(i % 10) for i, kind in enumerate(kinds)}
    figure, (gantt, cdf) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for row, outcome in enumerate(sorted(outcomes, key=lambda o: o.sent)):
        colour = colours.get(outcome.kind, "red")
        queue = outcome.timings.get("queue", 0.0)
        gantt.barh(row, queue, left=outcome.sent, color=colour, alpha=0.25)
        gantt.barh(row, outcome.latency - queue, left=outcome.sent + queue, color=colour)
    gantt.set(xlabel="seconds", ylabel="picture", title="picture by picture (pale: waiting)")
    for kind in kinds:
        latencies = np.sort([o.latency for o in outcomes if o.kind == kind and o.error is None])
        cdf.step(latencies, np.arange(1, len(latencies) + 1) / len(latencies), label=kind, color=colours[kind])
    cdf.set(xlabel="latency, seconds", ylabel="share of pictures", title="latency", ylim=(0, 1.02))
    cdf.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--model", help="default: the first model that the server lists")
    parser.add_argument("--num-requests", type=int, default=64)
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--concurrency", type=int, help="closed loop with so many clients")
    load.add_argument("--rate", type=float, help="open loop, Poisson arrivals a second")
    parser.add_argument("--sizes", type=lambda s: s.split(","), default=["64x64", "96x96", "128x64"])
    parser.add_argument("--steps", type=lambda s: [int(v) for v in s.split(",")], default=[4, 20])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--out", type=Path, default=Path("out/serving"), help="stem of the .json, .csv and .png")
    args = parser.parse_args(argv)
    if not args.rate and not args.concurrency:
        args.concurrency = 8
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    items = draw_workload(args.num_requests, args.sizes, args.steps, args.rate, args.seed)
    outcomes = asyncio.run(run_load(args, items))
    summary = summarise(outcomes)
    print_table(summary)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(o) for o in outcomes]
    args.out.with_suffix(".json").write_text(json.dumps({"summary": summary, "pictures": rows}, indent=1))
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "kind", "sent", "done", "latency", *STAGES, "error"])
        for o in outcomes:
            stages = [o.timings.get(stage, "") for stage in STAGES]
            writer.writerow([o.index, o.kind, o.sent, o.done, o.latency, *stages, o.error or ""])
    plot(outcomes, summary, args.out.with_suffix(".png"))
    print(f"wrote {args.out}.json, .csv, .png")
    if summary["num_errors"]:
        sys.exit(f"{summary['num_errors']} requests failed, the first: {next(o.error for o in outcomes if o.error)}")


if __name__ == "__main__":
    main()
