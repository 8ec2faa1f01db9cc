"""Data sheets of cards, and the least time that a step takes on one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.roofline.costs import ONE_DEVICE, StepCost
from vllm_omni.diffusion.data import DiffusionParallelConfig


@dataclass(frozen=True)
class Card:
    """Rates from NVIDIA's data sheets, dense (without sparsity), or measured ones in their place."""

    name: str
    bf16_flops: float
    """A second."""
    fp8_flops: float
    memory_bytes: float
    """A second."""
    link_bytes: float
    """A second to other cards, in each direction."""
    attention_flops: float | None = None
    """A second, where it was measured apart; None: those of bf16."""


CARDS = {
    "h100": Card("H100 SXM", 989e12, 1979e12, 3.35e12, 450e9),
    "h200": Card("H200 SXM", 989e12, 1979e12, 4.8e12, 450e9),
}


@dataclass(frozen=True)
class Floor:
    """Seconds that one rank cannot do without. A product takes what its arithmetic or its bytes take, the longer."""

    gemms: float
    attention: float
    pointwise: float
    exchanges: float

    @property
    def arithmetic(self) -> float:
        return self.gemms + self.attention

    @property
    def total(self) -> float:
        """One after another; an exchange that runs beside the arithmetic takes less."""
        return self.gemms + self.attention + self.pointwise + self.exchanges


def floor_of(cost: StepCost, card: Card, parallel: DiffusionParallelConfig = ONE_DEVICE, fp8: bool = False) -> Floor:
    """fp8: of the products in the blocks; attention stays in bf16."""
    attention_flops = card.attention_flops or card.bf16_flops
    gemms = 0.0
    for gemm in cost.gemms:
        is_fp8 = fp8 and "." in gemm.name
        flops, element = (card.fp8_flops, 1) if is_fp8 else (card.bf16_flops, 2)
        gemms += max(gemm.flops / flops, gemm.num_bytes(element) / card.memory_bytes)
    return Floor(
        gemms=gemms,
        attention=sum(max(a.flops / attention_flops, a.num_bytes / card.memory_bytes) for a in cost.attentions),
        pointwise=cost.pointwise_bytes / card.memory_bytes,
        exchanges=sum(wire_bytes(cost.exchanges, parallel).values()) / card.link_bytes,
    )


def wire_bytes(exchanges: Mapping[str, float], parallel: DiffusionParallelConfig) -> dict[str, float]:
    """Bytes that leave a rank (or reach it, where those are more), of those that it hands to the exchanges."""
    ulysses, tensor = parallel.ulysses_degree, parallel.tensor_parallel_size
    gathering = parallel.replica_size // tensor
    shares = {
        "all_to_all": (ulysses - 1) / ulysses,
        "p2p": 1.0,
        "all_reduce": 2 * (tensor - 1) / tensor,  # a ring: once round to sum, once to spread
        "all_gather": gathering - 1,
    }
    return {kind: shares[kind] * count for kind, count in exchanges.items()}
