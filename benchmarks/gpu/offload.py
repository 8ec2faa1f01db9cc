"""Section `offload`: steps of Qwen-Image whose blocks stream from host memory, beside all weights on the device."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Lazy, Size
from benchmarks.gpu.models import transformer_config
from benchmarks.gpu.report import Case, Row
from benchmarks.gpu.step import MODEL, peak_memory, request_of, started_runner
from benchmarks.timing import MAX_REPEATS, measure, release_memory
from vllm_omni.diffusion.compute.device.host_runs import host_run
from vllm_omni.diffusion.compute.offload.copies import copies_for
from vllm_omni.diffusion.compute.worker.runner import ModelRunner

SIDE, COUNTS = 1024, (1, 2, 4)
"""Pixels of a side, and requests of a step; all have guidance."""
LINK_BYTES = 2**30
TINY_LINK_BYTES = 2**20
LINK = "link"
NUM_STEPS = 4 * MAX_REPEATS
"""Steps of a request: more than two measurements repeat."""
WARM_UPS = 3
BUDGET_SECONDS = 4.0


@dataclass(frozen=True)
class Kind:
    """Weights of the transformer in one type."""

    settings: dict[str, Any]
    bytes_per_weight: int


KINDS = {"bf16": Kind({}, 2), "fp8": Kind({"quantization": "fp8"}, 1)}
PLACES: dict[str, dict[str, Any]] = {
    "resident": {},
    "layerwise": {"enable_layerwise_offload": True, "resident_layers": 0},
    "layerwise, 20 resident": {"enable_layerwise_offload": True, "resident_layers": 20},
}


def section_offload(bench: Bench) -> Iterator[Case]:
    """The rate of the link first, by which copies are predicted; a step takes the longer of computing and copying."""
    yield Case(LINK, partial(_measure_link, bench))
    for kind_name, kind in KINDS.items():
        for place, settings in PLACES.items():
            start = partial(started_runner, bench, {**kind.settings, **settings, "enforce_eager": True})
            with Lazy(start, lambda _: None) as runner:
                for count in COUNTS:
                    name = f"{MODEL} {SIDE} {kind_name}, {place}, {count}"
                    predicted = _predicted(bench, kind_name, settings.get("resident_layers"), count)
                    yield Case(name, partial(_measure, bench, name, runner, count, predicted), predicted)
            gc.collect()  # runs of a runner are in cycles with its hooks


def copied_bytes(bench: Bench, kind: Kind, resident_layers: int | None) -> int:
    """Bytes that a step copies: for each kind of token, products of 12 times the square of the width, in each block."""
    if resident_layers is None:
        return 0
    config = transformer_config(MODEL, bench.tiny)
    heads, head_dim, blocks = (int(config[k]) for k in ("num_attention_heads", "attention_head_dim", "num_layers"))
    return max(0, blocks - resident_layers) * 2 * 12 * (heads * head_dim) ** 2 * kind.bytes_per_weight


def _predicted(bench: Bench, kind_name: str, resident_layers: int | None, count: int) -> float | None:
    """Milliseconds: the longer of computing and copying; None for an unknown card."""
    computing = bench.predict(MODEL, [bench.size(SIDE)] * count, fp8=kind_name == "fp8")
    if computing is None:
        return None
    link = next((row.measured for row in bench.report.rows("offload") if row.case == LINK), None)
    copying = 1e3 * copied_bytes(bench, KINDS[kind_name], resident_layers) / (1e9 * (link or 55.0))
    return max(computing, copying)


def _measure_link(bench: Bench) -> list[Row]:
    """GB/s of copies from pinned host memory."""
    num_bytes = TINY_LINK_BYTES if bench.tiny else LINK_BYTES
    source, copies = host_run(num_bytes, bench.device), copies_for(bench.device)
    slot = copies.slot(num_bytes)

    def copy() -> None:
        copies.wait(copies.copy(source, slot))
        copies.released(slot)

    seconds = measure(copy, bench.device)
    rates = [num_bytes / 1e9 / s for s in (seconds.median, seconds.most, seconds.least)]
    return [Row(LINK, rates[0], "GB/s", spread=(rates[1], rates[2]))]


@torch.inference_mode()
def _measure(bench: Bench, case: str, runner: Lazy[ModelRunner], count: int, predicted: float | None) -> list[Row]:
    """Milliseconds of a step, and the peak of memory over encodes, steps and a decode."""
    started, size = runner.get(), bench.size(SIDE)
    release_memory(bench.device)
    step, decode = _stepper(bench, started, size, count)
    seconds = measure(step, bench.device, warm_ups=WARM_UPS, budget=0.2 if bench.tiny else BUDGET_SECONDS)
    decode()
    detail: dict[str, Any] = {"peak GiB": peak_memory(bench.device) / 2**30}
    if (offload := getattr(started.pipeline, "layer_offload", None)) is not None:
        copies = measure(offload.copy_all, bench.device, warm_ups=1)
        with offload.paused():
            computing = measure(step, bench.device, warm_ups=1)
        detail |= {"copies ms": 1e3 * copies.median, "computing ms": 1e3 * computing.median}
        detail["of the longer"] = seconds.median / max(copies.median, computing.median)
    return [Row.milliseconds(case, seconds, predicted, **detail)]


def _stepper(bench: Bench, runner: ModelRunner, size: Size, count: int) -> Any:
    """Function that runs the next step of some requests together, and one that decodes the first of them."""
    pipeline, request = runner.pipeline, request_of(bench, size, steps=NUM_STEPS)
    requests = [replace(request, request_id=f"step {n}", seed=n) for n in range(count)]
    states = [pipeline.encode(each) for each in requests]

    def step() -> None:
        for state, branches in zip(states, pipeline.predict(states), strict=True):
            pipeline.advance(state, branches)
            state.settle()

    return step, lambda: pipeline.decode([requests[0]], [states[0].latents])
