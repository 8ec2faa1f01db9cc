"""Sections `kernels` and `profile`: fused elementwise operations and norms; kernels by time in a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.report import Case, Row
from benchmarks.gpu.step import MODEL, started_runner, stepper
from benchmarks.timing import measure
from vllm_omni.diffusion.compute.layers.kernels import Projected, create_kernels
from vllm_omni.diffusion.compute.layers.rope import axis_rotations
from vllm_omni.errors import ConfigError

EPS = 1e-6
NUM_KERNELS = 14
NAME_WIDTH = 60
ROUNDS = 3
"""Rounds in which ways of the same work take turns, because a card is faster after a rest."""


def section_kernels(bench: Bench) -> Iterator[Case]:
    """Measure each operation of a 1024x1024 step with two branches: plain, compiled, and fused in Triton. Prediction:
    its bytes at the rate of a copy."""
    for name, (num_bytes, operation) in operations(bench).items():
        predicted = None if bench.card is None else 1e3 * num_bytes / bench.card.memory_bytes
        for way in ("plain", "compiled", "fused"):

            def run(name: str = name, way: str = way, operation: Any = operation, at: Any = predicted) -> list[Row]:
                if way == "fused" and bench.device.type != "cuda":
                    raise ConfigError("needs a GPU")
                bench.start_afresh()
                kernels = create_kernels("triton" if way == "fused" else "torch")
                call: Callable[..., Any] = lambda: operation(kernels)  # noqa: E731 - it may be compiled
                if way == "compiled" and bench.device.type == "cuda":
                    call = torch.compile(call, fullgraph=True)
                with torch.inference_mode():
                    return [Row.milliseconds(f"{name}, {way}", measure(call, bench.device), at)]

            yield Case(f"{name}, {way}", run, predicted)
    yield Case("product and GELU", lambda: _products(bench))


def operations(bench: Bench) -> dict[str, tuple[int, Callable[[Any], Any]]]:
    """Name of an operation -> bytes read and written, and a function of the kernels that runs it."""
    shape = bench.shape(MODEL)
    (branches,) = bench.branches(MODEL, [bench.size(1024)])
    image, text = sum(b.image for b in branches), sum(b.text for b in branches)
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=bench.device, dtype=dtype)

    width, head_dim = shape.dim, shape.head_dim
    x, y, table = random(image, width), random(image, width), random(1, 6, width)
    inner, bias = random(image, 4 * width), random(4 * width)
    streams = [Projected(random(n, 3 * width), random(2 * head_dim)) for n in (text, image)]
    order = torch.randperm(text + image, device=bench.device)
    stream = (order >= text).long()
    third = head_dim // 8 * 2
    positions = torch.randint(0, 64, (text + image, 3))
    rotations = axis_rotations(positions, (head_dim - 2 * third, third, third))[:, None, None].to(bench.device)
    return {
        "norm and modulation": (2 * x.nbytes, lambda k: k.norm_modulate(x, table[:, 0], table[:, 1], None, EPS)),
        "gated residual": (3 * x.nbytes, lambda k: k.gated_add(x, y, table[:, 2], None)),
        "heads": (
            2 * sum(s.qkv.nbytes for s in streams) + rotations.nbytes,
            lambda k: k.heads(streams, order, stream, rotations, EPS),
        ),
        "GELU": (2 * inner.nbytes, lambda k: k.gelu(inner, None)),
        "GELU with a bias, to float8": (3 * inner.nbytes // 2, lambda k: k.gelu(inner, bias, float8=True)),
        "norm and modulation, to float8": (
            3 * x.nbytes // 2,
            lambda k: k.norm_modulate(x, table[:, 0], table[:, 1], None, EPS, float8=True),
        ),
    }


def _products(bench: Bench) -> list[Row]:
    """Measure the MLP's product with GELU: as two kernels, compiled, and with GELU as cuBLAS's epilogue."""
    if bench.device.type != "cuda":
        raise ConfigError("needs a GPU")
    width = bench.shape(MODEL).dim
    (branches,) = bench.branches(MODEL, [bench.size(1024)])
    bench.start_afresh()
    x = torch.randn(sum(b.image for b in branches), width, device=bench.device, dtype=torch.bfloat16)
    weight = torch.randn(4 * width, width, device=bench.device, dtype=torch.bfloat16)
    bias = torch.randn(4 * width, device=bench.device, dtype=torch.bfloat16)

    def plain() -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    def epilogue() -> Tensor:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)

    ways: dict[str, Callable[[], Tensor]] = {
        "product, GELU": plain,
        "product, GELU, compiled": torch.compile(plain, fullgraph=True),
        "product with GELU": epilogue,
        "product with GELU, compiled": torch.compile(epilogue, fullgraph=True),
        "product alone": lambda: F.linear(x, weight, bias),
    }
    with torch.inference_mode():
        error = (plain().float() - epilogue().float()).abs().max().item()
        rounds = [{name: measure(run, bench.device) for name, run in ways.items()} for _ in range(ROUNDS)]
    best = {name: min((times[name] for times in rounds), key=lambda spread: spread.median) for name in ways}
    return [
        Row.milliseconds(name, spread, **({"largest difference": error} if "with" in name else {}))
        for name, spread in best.items()
    ]


def section_profile(bench: Bench) -> Iterator[Case]:
    """Kernels with the most time in a compiled 1024x1024 step."""
    yield Case("kernels of a step", lambda: _longest(bench))


@torch.inference_mode()
def _longest(bench: Bench) -> list[Row]:
    if bench.device.type != "cuda":
        raise ConfigError("needs a GPU")
    step = stepper(bench, started_runner(bench, {}), bench.size(1024))
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    spans: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events() or []:
        if event.device_type.name == "CUDA":
            spans[event.name].append((event.time_range.end - event.time_range.start) / 1e3)
    longest = sorted(spans.items(), key=lambda item: -sum(item[1]))[:NUM_KERNELS]
    total = sum(map(sum, spans.values()))
    return [
        Row(name[:NAME_WIDTH], sum(times), detail={"calls": len(times), "part %": 100 * sum(times) / total})
        for name, times in longest
    ]
