"""Our engine against plain diffusers in one run, on a tiny random model or any folder; only ratios count.

    python -m benchmarks.offline                    # 12 layers, 6 heads of 32, random weights
    python -m benchmarks.offline --model FOLDER

1. One request of 4 steps at 64x64, with and without guidance: engine (in process, and in a worker process) / diffusers.
2. Eight requests of different sizes, 10 steps, at once: against one after another, against diffusers, and against the
   scheduler's own price for their tokens, measured at start.
3. Latency beside others: a 4-step 64x64 request alone, and while an 80-step 256x256 request runs.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImagePipeline

from vllm_omni import AsyncOmni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt

SHORT = OmniDiffusionSamplingParams(height=64, width=64, num_inference_steps=4, true_cfg_scale=4.0, seed=1)
LONG = replace(SHORT, height=256, width=256, num_inference_steps=80)
SIZES = ((64, 64), (96, 64), (64, 96), (128, 64), (64, 128), (96, 96), (128, 96), (80, 112))
PLAIN, GUIDED = OmniPrompt("a red apple"), OmniPrompt("a red apple", " ")


async def finish(omni: AsyncOmni, prompt: OmniPrompt, params: OmniDiffusionSamplingParams) -> float:
    """Wait for the picture; return the seconds since the call."""
    start = time.perf_counter()
    async for _ in omni.generate(prompt, params):
        pass
    return time.perf_counter() - start


def run_diffusers(pipe: Any, prompt: OmniPrompt, params: OmniDiffusionSamplingParams, num_threads: int) -> float:
    """Seconds of one diffusers picture, with PyTorch's default number of threads (the engine chooses its own)."""
    engine_threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    start = time.perf_counter()
    pipe(
        prompt.prompt,
        negative_prompt=prompt.negative_prompt,
        height=params.height,
        width=params.width,
        num_inference_steps=params.num_inference_steps,
        true_cfg_scale=params.true_cfg_scale,
        generator=torch.Generator().manual_seed(params.seed or 0),
    )
    seconds = time.perf_counter() - start
    torch.set_num_threads(engine_threads)
    return seconds


async def median_in_turn(repeats: int, **contenders: Callable[[], Awaitable[float] | float]) -> dict[str, float]:
    """Median seconds of each contender, run in turn A B C A B C ..., so that a drifting machine affects all equally."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            outcome = run()
            taken = outcome if isinstance(outcome, float) else await outcome
            if repeat:  # the first round warms up
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


async def together(omni: AsyncOmni, all_params: Sequence[OmniDiffusionSamplingParams]) -> float:
    start = time.perf_counter()
    await asyncio.gather(*(finish(omni, GUIDED, params) for params in all_params))
    return time.perf_counter() - start


async def one_by_one(omni: AsyncOmni, all_params: Sequence[OmniDiffusionSamplingParams]) -> float:
    return sum([await finish(omni, GUIDED, params) for params in all_params])


async def beside_long(omni: AsyncOmni) -> float:
    """Seconds of the short request while the long one runs."""
    stream = omni.generate(GUIDED, LONG)
    async for output in stream:
        if output.step >= 3:
            break
    seconds = await finish(omni, GUIDED, SHORT)
    await stream.aclose()
    while omni.status().queue_seconds:  # noqa: ASYNC110 - the long request may be in its last step; there is no event for its end
        await asyncio.sleep(0.001)
    return seconds


async def measure(model: str, repeats: int) -> dict[str, Any]:
    num_threads = torch.get_num_threads()
    pipe = QwenImagePipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    inline = AsyncOmni(model=model, distributed_executor_backend="uni", dtype="float32")
    worker = AsyncOmni(model=model, distributed_executor_backend="mp", dtype="float32")
    await asyncio.gather(inline.start(), worker.start())
    try:
        many = [replace(SHORT, height=h, width=w, num_inference_steps=10) for h, w in SIZES]
        assert worker.ready is not None
        priced = [r.cost for params in many for r in worker.make_job(GUIDED, params).requests]
        num_packs = 10 * math.ceil(sum(c.tokens_per_step for c in priced) / worker.ready.max_batch_tokens)
        work = sum(c.total(10) for c in priced) * worker.ready.seconds_per_unit
        explained = work + num_packs * worker.ready.step_overhead_seconds
        return {
            "short, guided": await median_in_turn(
                repeats,
                diffusers=lambda: run_diffusers(pipe, GUIDED, SHORT, num_threads),
                diffusers_1_thread=lambda: run_diffusers(pipe, GUIDED, SHORT, 1),
                engine=lambda: finish(inline, GUIDED, SHORT),
                worker=lambda: finish(worker, GUIDED, SHORT),
            ),
            "short, no guidance": await median_in_turn(
                repeats,
                diffusers=lambda: run_diffusers(pipe, PLAIN, replace(SHORT, true_cfg_scale=1.0), num_threads),
                diffusers_1_thread=lambda: run_diffusers(pipe, PLAIN, replace(SHORT, true_cfg_scale=1.0), 1),
                engine=lambda: finish(inline, PLAIN, SHORT),
                worker=lambda: finish(worker, PLAIN, SHORT),
            ),
            "eight sizes, 10 steps": {
                **await median_in_turn(
                    max(1, repeats // 2),
                    diffusers=lambda: sum(run_diffusers(pipe, GUIDED, params, num_threads) for params in many),
                    one_by_one=lambda: one_by_one(worker, many),
                    together=lambda: together(worker, many),
                ),
                "explained_by_tokens": explained,
            },
            "settings": dataclasses.asdict(worker.ready),
            "neighbour": await median_in_turn(
                repeats, alone=lambda: finish(worker, GUIDED, SHORT), beside_80_steps=lambda: beside_long(worker)
            ),
        }
    finally:
        await asyncio.gather(inline.close(), worker.close())


def print_table(results: dict[str, Any]) -> None:
    print(f"measured at start: {results['settings']}")
    for scenario, rows in results.items():
        if scenario == "settings":
            continue
        reference, base = next(iter(rows.items()))
        print(f"\n{scenario}")
        for name, seconds in rows.items():
            print(f"  {name:<22}{seconds * 1e3:>9.1f} ms   {seconds / base:>6.2f} x {reference}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Qwen-Image folder; default: a random one, 12 layers, 6 heads of 32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out/offline.json"))
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            from testbed.tiny_models import build_tiny_qwen_image

            model = str(build_tiny_qwen_image(Path(folder) / "model", layers=12, heads=6, head_dim=32))
        results = asyncio.run(measure(model, args.repeats))
    print_table(results)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
