"""Sections `ceilings` and `parity`: what the card gives at the models' shapes; whether the pictures are right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tests.diffusion.worker.driving import psnr
from tests.tiny_models import build_tiny_qwen_image
from tests.tiny_z_image import build_tiny_z_image

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.report import Case, Row
from benchmarks.roofline.measured import Ceiling, ceilings, rate_of
from vllm_omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

KINDS = ("gemm", "fp8", "attention", "copy")
HIGHEST_PSNR = 120.0
"""Of pictures that are equal."""


def section_ceilings(bench: Bench) -> Iterator[Case]:
    """T/s (FLOPs or bytes) of each product, attention backend and copy of a 1024x1024 step."""
    for name in ("qwen-image", "z-image"):

        def run(name: str = name) -> list[Row]:
            cost = bench.cost(name, [bench.size(1024)])
            found = list(ceilings(cost, 2**20, 0.01) if bench.tiny else ceilings(cost))
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
    """PSNR of our pictures to diffusers', on the same device, of small random models of every packed family."""
    builders = {"qwen_image": build_tiny_qwen_image, "z_image": build_tiny_z_image}
    for family, build in builders.items():
        for dtype in ("float32", "bfloat16"):

            def run(family: str = family, build: Any = build, dtype: str = dtype) -> list[Row]:
                path = bench.models / f"parity-{family}"
                if not (path / "model_index.json").is_file():
                    build(path, heads=4)
                found = _parity(path, family, dtype, bench.device)
                return [Row(f"{family} {dtype}", min(found), "dB", detail={"pictures": len(found)})]

            yield Case(f"{family} {dtype}", run)


def _parity(path: Path, family: str, dtype: str, device: torch.device) -> list[float]:
    """Of guided pictures of several sizes, ours made in one batch."""
    scale: dict[str, Any] = {"guidance_scale": 4.0} if family == "z_image" else {"true_cfg_scale": 4.0}
    prompt = {"prompt": "a red apple", "negative_prompt": "a blue car"}
    params = [
        OmniDiffusionSamplingParams(height=h, width=w, num_inference_steps=6, seed=i, output_type="np", **scale)
        for i, (h, w) in enumerate(((64, 64), (96, 64), (80, 112)))
    ]
    with Omni(model=str(path), dtype=dtype, progress_bar=False) as omni:
        ours = [output.images[0] for output in omni.generate([prompt] * len(params), params)]
    pipeline = DiffusionPipeline.from_pretrained(path, dtype=getattr(torch, dtype)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    found = []
    for picture, p in zip(ours, params, strict=True):
        theirs = pipeline(
            **prompt,
            **scale,
            height=p.height,
            width=p.width,
            num_inference_steps=p.num_inference_steps,
            generator=torch.Generator("cpu").manual_seed(p.seed or 0),
        ).images[0]
        found.append(min(HIGHEST_PSNR, psnr(picture, np.asarray(theirs))))
    return found
