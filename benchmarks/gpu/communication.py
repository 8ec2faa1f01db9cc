"""Section `communication`: exchanges between ranks against the link, how much of them is hidden, shared decodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.gpu import exchanges
from benchmarks.gpu.bench import Bench, Lazy, Size
from benchmarks.gpu.exchanges import AttentionParts, Decodes, Exchange
from benchmarks.gpu.layouts import MODEL, check_devices
from benchmarks.gpu.ranks import RankProcesses, in_world, listening_store
from benchmarks.gpu.report import Case, Row
from benchmarks.roofline.cards import floor_of, wire_bytes
from benchmarks.roofline.measured import card_at_hand
from vllm_omni.diffusion.data import DiffusionParallelConfig

SIZES = (1024, 2048)
LINK_BYTES = 2**30
LINK = "link, both ways at once"


def section_communication(bench: Bench) -> Iterator[Case]:
    """Measure on as many ranks as the largest layout has. Prediction: bytes at the link's rate by the data sheet."""
    count = max((DiffusionParallelConfig(**degrees).replica_size for degrees in bench.layouts), default=1)
    store = listening_store()
    with Lazy(lambda: _start(bench, count, store.port), RankProcesses.close) as ranks:
        subject = Communication(bench, count, ranks)
        yield Case("link", subject.link, subject.link_predicted)
        for side in SIZES:
            size = bench.size(side)
            name = f"{size[1]}x{size[0]}"
            for kind in ("ulysses", "ring"):
                run = partial(subject.attention, kind, size)
                yield Case(f"{kind} {count}, {name}", run, subject.exchange_predicted(kind, size))
            yield Case(
                f"tensor {count}, {name}", partial(subject.sums, size), subject.exchange_predicted("tensor", size)
            )
            yield Case(f"decode, {name}", partial(subject.decode, size))


def _start(bench: Bench, count: int, port: int) -> RankProcesses:
    check_devices(bench, max(2, count))
    kind = bench.device.type
    parallel = replace(parallel_of("ulysses", count), vae_patch_parallel_size=count)
    return RankProcesses(count, kind, partial(in_world, parallel, kind, port))


def parallel_of(kind: str, count: int) -> DiffusionParallelConfig:
    degrees = {"ulysses": "ulysses_degree", "ring": "ring_degree", "tensor": "tensor_parallel_size"}
    return DiffusionParallelConfig(**{degrees[kind]: count})


@dataclass(frozen=True)
class Communication:
    bench: Bench
    count: int
    ranks: Lazy[RankProcesses]

    @property
    def link_rate(self) -> float | None:
        """Bytes per second of the link in each direction, by the data sheet."""
        card = card_at_hand()
        return card.link_bytes if card else None

    @property
    def link_bytes(self) -> int:
        return 2**20 if self.bench.tiny else LINK_BYTES

    @property
    def link_predicted(self) -> float | None:
        return self.link_rate and 1e3 * self.link_bytes / self.link_rate

    def exchange_predicted(self, kind: str, size: Size) -> float | None:
        """Predicted milliseconds of a layer's exchanges, none of them hidden."""
        if self.link_rate is None:
            return None
        parallel = parallel_of(kind, self.count)
        sent = wire_bytes(self.bench.cost(MODEL, [size], parallel).exchanges, parallel)
        sent.pop("all_gather", None)  # once a step
        return 1e3 * sum(sent.values()) / self.link_rate / self.bench.shape(MODEL).num_blocks

    def link(self) -> list[Row]:
        ranks = self.ranks.get()
        num_bytes = self.link_bytes
        return [
            self._rate_row(name, self._slowest(ranks.run(function, num_bytes)))
            for name, function in (("link, one way", exchanges.one_way), (LINK, exchanges.both_ways))
        ]

    def attention(self, kind: str, size: Size) -> list[Row]:
        """Rows of a layer: rates of its exchanges, and milliseconds of its attention against the floor."""
        shape = self.bench.shape(MODEL)
        (branches,) = self.bench.branches(MODEL, [size])
        function = {"ulysses": exchanges.ulysses, "ring": exchanges.ring}[kind]
        found = self.ranks.get().run(function, branches, shape.heads, shape.head_dim)
        parts: AttentionParts = found[0]
        case = f"{kind} {self.count}, {size[1]}x{size[0]}"
        names = ("q, k and v to heads", "output to tokens") if kind == "ulysses" else ("keys and values",)
        turns = [self._slowest([part.exchanges[i] for part in found]) for i in range(len(names))]
        rows = [self._rate_row(f"{case}, {name}", turn) for name, turn in zip(names, turns, strict=True)]
        alone = sum(turn.seconds for turn in turns)
        around = parts.layer - parts.attention
        detail: dict[str, Any] = {"attention alone ms": 1e3 * parts.attention, "exchange alone ms": 1e3 * alone}
        if kind == "ring":
            detail["of the exchange hidden, %"] = 100 * (1 - around / alone)
        else:
            detail["neither, ms"] = 1e3 * (around - alone)
        rows.append(
            Row(f"{case}, attention of a layer", 1e3 * parts.layer, "ms", self._layer_floor(kind, size), detail=detail)
        )
        return rows

    def _layer_floor(self, kind: str, size: Size) -> float | None:
        """Least milliseconds of a layer: attention plus exchanges for Ulysses, the longer of the two for a ring."""
        exchange, card = self.exchange_predicted(kind, size), self.bench.card
        if exchange is None or card is None:
            return None
        parallel, num_blocks = parallel_of(kind, self.count), self.bench.shape(MODEL).num_blocks
        attention = 1e3 * floor_of(self.bench.cost(MODEL, [size], parallel), card, parallel).attention / num_blocks
        return max(attention, exchange) if kind == "ring" else attention + exchange

    def sums(self, size: Size) -> list[Row]:
        """All-reduce after a row-parallel layer, over all tokens of both branches."""
        (branches,) = self.bench.branches(MODEL, [size])
        rows = sum(branch.text + branch.image for branch in branches)
        found = self.ranks.get().run(exchanges.all_reduce, rows, self.bench.shape(MODEL).dim)
        return [self._rate_row(f"tensor {self.count}, {size[1]}x{size[0]}, sum of {rows} tokens", self._slowest(found))]

    def decode(self, size: Size) -> list[Row]:
        """Rows of a decode. Prediction for the shared one: one rank's time, scaled by the largest share of the area."""
        found: Decodes = self.ranks.get().run(exchanges.decodes, self.bench.model(MODEL), size)[0]
        case = f"decode, {size[1]}x{size[0]}"
        gains = {"over tiled": found.tiled / found.shared, "over whole": found.whole / found.shared}
        return [
            Row(f"{case}, one rank, whole", 1e3 * found.whole),
            Row(f"{case}, one rank, tiled", 1e3 * found.tiled),
            Row(
                f"{case}, {self.count} ranks",
                1e3 * found.shared,
                "ms",
                1e3 * found.tiled * found.largest_share,
                detail=gains,
            ),
        ]

    def _rate_row(self, case: str, exchange: Exchange) -> Row:
        rate = exchange.wire_bytes / exchange.seconds
        detail: dict[str, Any] = {"MB each way": exchange.wire_bytes / 1e6, "ms": 1e3 * exchange.seconds}
        if link := next((r.measured for r in self.bench.report.rows("communication") if r.case == LINK), None):
            detail["of the measured link"] = rate / 1e9 / link
        return Row(case, rate / 1e9, "GB/s", self.link_rate and self.link_rate / 1e9, detail=detail)

    def _slowest(self, found: list[Exchange]) -> Exchange:
        """Result of the rank with the most bytes; the time is the same for all ranks."""
        return max(found, key=lambda exchange: exchange.wire_bytes)
