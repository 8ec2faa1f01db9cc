"""Section `video_kernels`: the operations between the products of Wan's blocks, against the speed of a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.report import Case, Row
from benchmarks.gpu.video_step import LARGE, SINGLE, SMALL
from benchmarks.timing import measure
from vllm_omni.diffusion.compute.layers.kernels import Kernels, Projected, create_kernels

EPS = 1e-6
BUDGET_SECONDS = 0.1


def section_video_kernels(bench: Bench) -> Iterator[Case]:
    """Measure each operation of a 480p step of one branch, by the default kernels. Prediction: its bytes at the rate of
    a copy."""
    for model in (LARGE, SMALL):
        yield Case(model, partial(_measure, bench, model))


@torch.inference_mode()
def _measure(bench: Bench, model: str) -> list[Row]:
    kernels = create_kernels("triton" if bench.device.type == "cuda" else "torch")
    card = bench.card_for(model)
    rows = []
    for name, (num_bytes, operation) in _operations(bench, model).items():
        predicted = None if card is None else 1e3 * num_bytes / card.memory_bytes
        seconds = measure(partial(operation, kernels), bench.device, budget=BUDGET_SECONDS)
        rows.append(Row.milliseconds(f"{model}, {name}", seconds, predicted))
    return rows


def _operations(bench: Bench, model: str) -> dict[str, tuple[int, Callable[[Kernels], Any]]]:
    """Name of an operation -> bytes read and written, and a function of the kernels that runs it."""
    shape = bench.shape(model)
    tokens = bench.info(model).num_image_tokens(*SINGLE.size(bench))
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=bench.device, dtype=dtype)

    width, inner_width = shape.dim, next(g.columns for g in shape.gemms(0, 1, 1, 1) if g.name == "video.up")
    x, y, inner = random(tokens, width), random(tokens, width), random(tokens, inner_width)
    table = torch.randn(1, 6, width, device=bench.device)
    rotations = torch.randn(tokens, 1, 1, shape.head_dim // 2, 2, device=bench.device)
    projected = Projected(random(tokens, 3 * width), random(2 * width))
    weight = random(width)
    return {
        "norm and modulation": (2 * x.nbytes, lambda k: k.norm_modulate(x, table[:, 0], table[:, 1], None, EPS)),
        "gated residual": (3 * x.nbytes, lambda k: k.gated_add(x, y, table[:, 2], None)),
        "sum": (3 * x.nbytes, lambda k: x + y),
        "heads": (4 * x.nbytes + rotations.nbytes, lambda k: k.wide_heads(projected, rotations, EPS)),
        "norm of the text's queries": (2 * x.nbytes, lambda k: k.wide_norm(x, weight, None, EPS)),
        "GELU": (2 * inner.nbytes, lambda k: k.gelu(inner, None)),
        "norm and modulation, to float8": (
            3 * x.nbytes // 2,
            lambda k: k.norm_modulate(x, table[:, 0], table[:, 1], None, EPS, float8=True),
        ),
        "rounding to float8": (3 * x.nbytes // 2, lambda k: k.round_rows(x)),
    }
