"""Data sheets of cards, and the least time of a step on a card."""

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
    """FLOPs per second."""
    fp8_flops: float
    memory_bytes: float
    """Bytes per second of its memory."""
    link_bytes: float
    """Bytes per second to other cards, in each direction."""
    attention_flops: float | None = None
    """FLOPs per second of attention, if measured separately; None: `bf16_flops`."""


CARDS = {
    "h100": Card("H100 SXM", 989e12, 1979e12, 3.35e12, 450e9),
    "h200": Card("H200 SXM", 989e12, 1979e12, 4.8e12, 450e9),
}


@dataclass(frozen=True)
class Floor:
    """Least seconds of one rank in a step. A product takes the longer of its arithmetic and its bytes."""

    gemms: float
    attention: float
    pointwise: float
    exchanges: float

    @property
    def arithmetic(self) -> float:
        return self.gemms + self.attention

    @property
    def total(self) -> float:
        """Sum of all parts; an exchange in parallel with arithmetic takes less."""
        return self.gemms + self.attention + self.pointwise + self.exchanges


def floor_of(cost: StepCost, card: Card, parallel: DiffusionParallelConfig = ONE_DEVICE, fp8: bool = False) -> Floor:
    """Floor of a step on a card. `fp8`: for the products in the blocks; attention stays in bf16."""
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
    """Bytes that leave or reach a rank, whichever is more, in the exchanges of a step."""
    ulysses, tensor = parallel.ulysses_degree, parallel.tensor_parallel_size
    gathering = parallel.replica_size // tensor
    shares = {
        "all_to_all": (ulysses - 1) / ulysses,
        "p2p": 1.0,
        "all_reduce": 2 * (tensor - 1) / tensor,  # a ring all-reduce: one round to sum, one to distribute
        "all_gather": gathering - 1,
    }
    return {kind: shares[kind] * count for kind, count in exchanges.items()}
