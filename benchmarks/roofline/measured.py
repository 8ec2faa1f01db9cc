"""Rates of a step's products and attention, measured one by one on this device, and a card with these rates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.roofline.cards import CARDS, Card
from benchmarks.roofline.ceilings import attention_seconds, copy_seconds, fp8_gemm_seconds, gemm_seconds
from benchmarks.roofline.costs import StepCost
from benchmarks.timing import BUDGET_SECONDS, here
from vllm_omni.diffusion.compute.attention import BACKENDS

COPY_BYTES = 2**30
UNKNOWN = Card("unknown", math.nan, math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Ceiling:
    """Measured rate, in FLOPs or bytes per second."""

    kind: str
    """Kind of work: gemm, fp8, attention or copy."""
    name: str
    rate: float | None
    promised: float
    """Rate in the data sheet; NaN for an unknown card."""
    refused: str = ""
    weight: float = 0.0
    """FLOPs of this shape in one step."""


def card_at_hand() -> Card | None:
    """Data sheet of this device; None for an unknown device."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((card for key, card in CARDS.items() if key.upper() in name), None)


def ceilings(cost: StepCost, copy_bytes: int = COPY_BYTES, budget: float = BUDGET_SECONDS) -> Iterator[Ceiling]:
    """Measure all rates, `budget` seconds each; a rate that the device lacks has the reason instead."""
    device, promised = here(), card_at_hand() or UNKNOWN
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for gemm in cost.gemms:
        if not gemm.rows:
            continue
        shape = f"{gemm.name} {gemm.rows}x{gemm.columns}x{gemm.inner}"
        one = gemm.flops / gemm.count
        seconds = gemm_seconds(gemm, device, dtype, budget).median
        yield Ceiling("gemm", shape, one / seconds, promised.bf16_flops, weight=gemm.flops)
        if "." in gemm.name:
            try:
                fast = one / fp8_gemm_seconds(gemm, device, budget).median
                yield Ceiling("fp8", shape, fast, promised.fp8_flops, weight=gemm.flops)
            except (RuntimeError, ValueError) as error:
                yield Ceiling("fp8", shape, None, promised.fp8_flops, str(error).partition("\n")[0])
    # Attention of the blocks to the sequence itself, on one device.
    layer = [a for a in cost.attentions if a.count == cost.attentions[-1].count and a.keys == a.queries]
    flops = sum(a.flops / a.count for a in layer)
    for backend in BACKENDS:
        try:
            rate = flops / attention_seconds(layer, backend, device, dtype, budget).median
            yield Ceiling("attention", backend, rate, promised.bf16_flops, weight=flops)
        except Exception as error:  # backends raise any class where they do not run; the others are still measured
            yield Ceiling("attention", backend, None, promised.bf16_flops, str(error).partition("\n")[0])
    rate = 2 * copy_bytes / copy_seconds(copy_bytes, device, budget).median
    yield Ceiling("copy", f"{copy_bytes / 2**30:.2g} GiB", rate, promised.memory_bytes)


def rate_of(found: list[Ceiling], kind: str) -> float | None:
    """Rate over all shapes of one kind, weighted as in the step; for attention, the fastest backend's."""
    known = [c for c in found if c.kind == kind and c.rate]
    if not known:
        return None
    if kind in ("attention", "copy"):
        return max(c.rate or 0.0 for c in known)
    return sum(c.weight for c in known) / sum(c.weight / (c.rate or 1.0) for c in known)


def print_ceilings(cost: StepCost) -> None:
    print("\n| ceiling | shape | T/s | promised T/s | part |\n|---|---|---|---|---|")
    for c in ceilings(cost):
        if c.rate is None:
            print(f"| {c.kind} | {c.name} | refused: {c.refused} | | |")
            continue
        part = c.rate / c.promised
        print(f"| {c.kind} | {c.name} | {c.rate / 1e12:.2f} | {c.promised / 1e12:.2f} | {part:.0%} |")
    print()
