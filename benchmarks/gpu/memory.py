"""Section `memory`: predicted and measured peak of a device's memory, by size of the picture and by setting."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Lazy
from benchmarks.gpu.report import Case, Row
from benchmarks.gpu.step import MODEL, Z_IMAGE, peak_memory, request_of, started_runner
from benchmarks.gpu.turns import turn_cases
from benchmarks.timing import measure, release_memory
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.memory.budget import request_peak_bytes
from vllm_omni.diffusion.compute.memory.planned_requests import sized_planned_request
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig

NUM_STEPS = 20
"""Steps of the picture whose seconds are given."""
WARM_UPS = 2
BUDGET_SECONDS = 2.0
FP8: dict[str, Any] = {"quantization": "fp8"}
STREAMED: dict[str, Any] = {"enable_layerwise_offload": True, "resident_layers": 0}
SETTINGS: tuple[tuple[str, str, dict[str, Any], tuple[int, ...]], ...] = (
    (MODEL, "resident", {}, (1024, 512, 2048)),
    (MODEL, "layerwise fp8", {**FP8, **STREAMED}, (1024,)),
    (MODEL, "layerwise bf16", STREAMED, (1024,)),
    (Z_IMAGE, "resident", {}, (1024, 2048)),
    (MODEL, "fp8", FP8, (1024,)),
    (MODEL, "text encoder fp8", {"text_encoder_quantization": "fp8"}, (1024,)),
    (MODEL, "turns", {"enable_cpu_offload": True}, (1024,)),
)
"""(model, name of the setting, flags, sides in pixels), the most valuable first: a call may run out of time."""


def section_memory(bench: Bench) -> Iterator[Case]:
    for model, name, settings, sides in SETTINGS:
        eager = {**settings, "enforce_eager": True}
        with Lazy(partial(started_runner, bench, eager, model), lambda _: None) as runner:
            for side in sides:
                case = f"{model} {side}, {name}"
                yield Case(case, partial(_measure, bench, case, runner, model, eager, side))
        gc.collect()  # runs of a runner are in cycles with its hooks
    yield from turn_cases(bench)


def predicted_peak(bench: Bench, model: str, settings: dict[str, Any], side: int) -> float:
    """GiB of memory that PyTorch allocates for one picture."""
    config = OmniDiffusionConfig(model=bench.model(model), load_format="dummy", **settings)
    info = load_model_info(config.model, config.load_format)
    assert isinstance(info, PackedModelInfo)
    request = sized_planned_request(info, *bench.size(side))
    return request_peak_bytes(config, info, request, torch.bfloat16) / 2**30


@torch.inference_mode()
def _measure(
    bench: Bench, case: str, runner: Lazy[ModelRunner], model: str, settings: dict[str, Any], side: int
) -> list[Row]:
    """GiB at the peak of an encode, some steps and a decode, and seconds of a picture from the three."""
    pipeline = runner.get().pipeline
    predicted = predicted_peak(bench, model, settings, side)
    release_memory(bench.device)
    request = request_of(bench, bench.size(side), model)
    begin = time.perf_counter()
    state = pipeline.encode(request)
    _wait(bench.device)
    encode = time.perf_counter() - begin

    def step() -> None:
        (branches,) = pipeline.predict([state])
        pipeline.advance(state, branches)
        state.settle()

    steps = measure(step, bench.device, warm_ups=WARM_UPS, budget=0.1 if bench.tiny else BUDGET_SECONDS)
    begin = time.perf_counter()
    pipeline.decode([request], [state.latents])
    _wait(bench.device)
    decode = time.perf_counter() - begin
    detail = {"encode s": encode, "step s": steps.median, "decode s": decode}
    detail[f"s a picture of {NUM_STEPS} steps"] = encode + NUM_STEPS * steps.median + decode
    return [Row(case, peak_memory(bench.device) / 2**30, "GiB", predicted, detail=detail)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
