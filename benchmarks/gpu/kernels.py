"""Sections `ceilings` and `parity`: measured rates at the models' shapes; correctness of the pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.bench import Bench, Size
from benchmarks.gpu.families import FAMILIES, Family
from benchmarks.gpu.report import Case, Row
from benchmarks.roofline.measured import Ceiling, ceilings, rate_of
from benchmarks.timing import BUDGET_SECONDS
from testbed.runner_driver import Drive, psnr
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest

CEILINGS: dict[str, Size] = {
    "qwen-image": (1024, 1024),
    "z-image": (1024, 1024),
    "wan-1.3b": (480, 832, 81),
    "wan-14b": (480, 832, 81),
}
"""Model -> size of the step whose shapes are measured; of a video one branch."""
VIDEO_BUDGET_SECONDS = 0.2
KINDS = ("gemm", "fp8", "attention", "copy")
HIGHEST_PSNR = 120.0
"""PSNR in decibels that stands for equal pictures."""


def section_ceilings(bench: Bench) -> Iterator[Case]:
    """Measure T/s (FLOPs or bytes) of each product, attention backend and copy of a step."""
    for name, size in CEILINGS.items():

        def run(name: str = name, size: Size = size) -> list[Row]:
            is_video = len(size) == 3
            at = bench.video(*size) if is_video else bench.size(*size)
            cost = bench.cost(name, [at], guided=not is_video)
            budget = VIDEO_BUDGET_SECONDS if is_video else BUDGET_SECONDS
            found = list(ceilings(cost, 2**20, 0.01) if bench.tiny else ceilings(cost, budget=budget))
            rows = [_row(f"{name} {c.kind} {c.name}", c) for c in found]
            for kind in KINDS:
                rate = rate_of(found, kind)
                rows.append(
                    Row(f"{name} {kind}, all shapes", rate and rate / 1e12, "T/s", refused="" if rate else "none runs")
                )
            return rows

        yield Case(name, run)


def _row(case: str, ceiling: Ceiling) -> Row:
    promised = None if np.isnan(ceiling.promised) else ceiling.promised / 1e12
    rate = None if ceiling.rate is None else ceiling.rate / 1e12
    return Row(case, rate, "T/s", promised, refused=ceiling.refused)


def section_parity(bench: Bench) -> Iterator[Case]:
    """Measure the PSNR of our pictures, made in one batch of several sizes, to diffusers' and to ours made alone.

    For small random models of every packed family and of two whole pipelines, on the same device.
    """
    for name, family in FAMILIES.items():
        for dtype in (torch.float32, torch.bfloat16):
            case = f"{name} {_name(dtype)}"
            yield Case(case, partial(_parity, bench, case, name, family, dtype))
    # The loss by float8 is visible only in a trained model.
    yield Case("demo fp8", partial(_parity, bench, "demo fp8", "demo", FAMILIES["demo"], torch.bfloat16, "fp8"))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.inference_mode()
def _parity(
    bench: Bench, case: str, name: str, family: Family, dtype: torch.dtype, quantization: str | None = None
) -> list[Row]:
    path = family.model(bench.models / f"parity-{name}")
    requests = family.requests(path)
    runner = started_at(str(path), dtype=_name(dtype), quantization=quantization, enforce_eager=True)
    together = pictures(runner, requests)
    alone = {r.request_id: pictures(runner, [r])[r.request_id] for r in requests}
    pipeline = family.load(path, dtype, bench.device)
    theirs = {r.request_id: family.draw(pipeline, r) for r in requests}
    detail: dict[str, Any] = {"pictures": len(requests)}
    if dtype != torch.float32:
        exact_pipeline = family.load(path, torch.float32, bench.device)
        exact = {r.request_id: family.draw(exact_pipeline, r, noise=dtype) for r in requests}
        detail |= {"ours to float32 dB": worst(together, exact), "diffusers to float32 dB": worst(theirs, exact)}
    return [
        Row(case, worst(together, theirs), "dB", detail=detail),
        Row(f"{case}, beside others and alone", worst(together, alone), "dB"),
    ]


def started_at(model: str, **settings: Any) -> ModelRunner:
    runner = ModelRunner(OmniDiffusionConfig(model=model, **settings), load_model_info(model))
    runner.start()
    return runner


def pictures(runner: ModelRunner, requests: Sequence[DiffusionRequest]) -> dict[str, np.ndarray]:
    """Pictures by request id, made in one batch. Raises RuntimeError if one fails."""
    drive = Drive(runner).run({0: requests})
    for error in drive.errors.values():
        raise RuntimeError(error.message)
    return drive.images


def worst(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """Least PSNR of the pictures."""
    return min(min(HIGHEST_PSNR, psnr(ours[i], theirs[i])) for i in ours)
