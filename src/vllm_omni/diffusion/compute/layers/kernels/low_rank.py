"""Triton kernels of low-rank changes: one launch with A and one with B for all adapters and parts of a layer.

A *segment* is a run of rows with the same adapters and scales. Its rows are cut into tiles. Tables on the device say
which rows a tile has, and where the weights of its segment's adapters are: ranks differ from adapter to adapter, and
an adapter may change some parts of a layer only.

    shrink:  s[rows, ranks] = scale * x[rows] A^T    in float32, a summand for each split of the inputs
    expand:  y[rows] += s B^T; or GELU of that; or y[rows] = bias + s B^T before the layer's own product is added
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.layers.kernels.activations import gelu_by_tanh
from vllm_omni.diffusion.compute.layers.low_rank import AdaptedLayer, LayerChange, LayerWeights
from vllm_omni.diffusion.compute.layers.rounding import Float8Rows, Rows

TILE_ROWS = 64
TILE_OUTPUTS = 256
MAX_RANK_BLOCK = 128
"""Most ranks that a program computes at once; more take turns."""
MIN_PROGRAMS = 264
"""Programs of a shrink that keep a GPU busy: two on each multiprocessor of the largest ones."""
MAX_SPLITS = 16
ALIGNED_RANKS = 8
"""Ranks in 16 bytes of bfloat16, which a thread loads at once."""
TILE_FIELDS = 3
"""Fields of a tile: first row, end of the rows, number of the segment."""
ENTRY_FIELDS = 4
"""Fields of an entry: bits of the scale, first column in s, address of A, rows of A. Then those of each part."""
PART_FIELDS = 3
"""Fields of a part of an entry: address of B, its first row of A, its rows of A."""
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Segment(NamedTuple):
    start: int
    stop: int
    adapters: tuple[tuple[LayerWeights, float], ...]
    """Weights with their scales."""


def segments_of(layer: AdaptedLayer) -> list[Segment]:
    """Segments of a layer's rows, in order.

    Where all other rows have adapters, the gaps are segments without any, so that the rows are complete. Otherwise rows
    without adapters are in no segment.
    """
    by_rows: dict[tuple[int, int], tuple[tuple[LayerWeights, float], ...]] = {}
    for weights, ranges in layer.parts:
        for start, stop, scale in ranges:
            by_rows[start, stop] = (*by_rows.get((start, stop), ()), (weights, scale))
    found: list[Segment] = []
    for (start, stop), adapters in sorted(by_rows.items()):
        if start == stop:
            continue
        if found and found[-1].stop == start and _same(found[-1].adapters, adapters):
            found[-1] = found[-1]._replace(stop=stop)
        else:
            found.append(Segment(start, stop, adapters))
    gaps = [Segment(start, stop, ()) for start, stop in layer.gaps]
    return sorted((*found, *gaps)) if _num_rows([*found, *gaps]) == layer.num_rows else found


def _num_rows(segments: Sequence[Segment]) -> int:
    return sum(its.stop - its.start for its in segments)


def _same(first: Sequence[tuple[LayerWeights, float]], second: Sequence[tuple[LayerWeights, float]]) -> bool:
    return [(id(weights), scale) for weights, scale in first] == [(id(weights), scale) for weights, scale in second]


@dataclass(frozen=True)
class GroupedChange(LayerChange):
    """Changes of one layer by two kernels."""

    tiles: Tensor
    """int64 [tiles, TILE_FIELDS]"""
    entries: Tensor
    """int64 [segments, most adapters of a segment, ENTRY_FIELDS + PART_FIELDS * parts]; ranks of 0 where there is none.
    """
    num_parts: int
    most_ranks: int
    """Most rows of one A."""
    width: int
    """Columns of s: most ranks of all adapters of a segment."""
    is_complete: bool
    """Whether the segments have all rows."""
    is_aligned: bool
    """Whether all ranks are multiples of ALIGNED_RANKS."""
    weights: tuple[LayerWeights, ...]
    """Weights whose addresses are in `entries`, to keep them."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.is_complete:
            return super().linear(x, weight, bias)
        # Written first and added by the product, y is not read again by a kernel of its own.
        y = x.new_empty((len(x), len(weight)))
        self._expand(y, self._shrink(x), bias, adds=False)
        return y.addmm_(x, weight.t())

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if not self.is_complete:
            return None
        y = F.linear(x, weight, bias)
        self._expand(y, self._shrink(x), None, adds=True, activates=True)
        return y

    def add_to(self, y: Tensor, x: Rows) -> Tensor:
        if len(self.tiles):
            self._expand(y, self._shrink(x), None, adds=True)
        return y

    def _shrink(self, x: Rows) -> Tensor:
        """Summands of s: float32 [splits, rows, width]. Other than the segments' rows and ranks are undefined."""
        values, scales, dtype = x if isinstance(x, Float8Rows) else (x.contiguous(), None, x.dtype)
        num_rows, num_inputs = values.shape
        rank_block = min(max(16, triton.next_power_of_2(self.most_ranks)), MAX_RANK_BLOCK)
        rank_blocks = triton.cdiv(self.most_ranks, rank_block)
        input_block = (128 if rank_block < MAX_RANK_BLOCK else 64) // (2 if dtype == torch.float32 else 1)
        programs = len(self.tiles) * self.entries.shape[1] * rank_blocks
        splits = min(triton.cdiv(MIN_PROGRAMS, programs), MAX_SPLITS, triton.cdiv(num_inputs, 2 * input_block))
        split_inputs = triton.cdiv(triton.cdiv(num_inputs, splits), input_block) * input_block
        splits = triton.cdiv(num_inputs, split_inputs)
        shrunk = values.new_empty((splits, num_rows, self.width), dtype=torch.float32)
        _shrink[(len(self.tiles), self.entries.shape[1] * rank_blocks, splits)](
            values, scales, shrunk, self.tiles, self.entries, num_rows, num_inputs, split_inputs, self.width,
            self.entries.shape[1], self.entries.shape[2], rank_blocks,
            HAS_SCALES=scales is not None, DTYPE=TRITON_DTYPES[dtype], TILE_FIELDS=TILE_FIELDS, ROWS=TILE_ROWS,
            RANKS=rank_block, INPUTS=input_block, num_warps=4, num_stages=3,
        )  # fmt: skip
        return shrunk

    def _expand(self, y: Tensor, shrunk: Tensor, bias: Tensor | None, adds: bool, activates: bool = False) -> None:
        splits, num_rows, _ = shrunk.shape
        part_outputs = y.shape[1] // self.num_parts
        output_blocks = triton.cdiv(part_outputs, TILE_OUTPUTS)
        rank_block = min(max(16, triton.next_power_of_2(self.most_ranks // self.num_parts)), 64)
        _expand[(len(self.tiles), self.num_parts * output_blocks)](
            y, bias, shrunk, self.tiles, self.entries, num_rows, part_outputs, y.shape[1], self.width, splits,
            self.entries.shape[1], self.entries.shape[2], output_blocks,
            HAS_BIAS=bias is not None, ADDS=adds, ACTIVATES=activates, IS_ALIGNED=self.is_aligned,
            DTYPE=TRITON_DTYPES[y.dtype], TILE_FIELDS=TILE_FIELDS, ENTRY_FIELDS=ENTRY_FIELDS, PART_FIELDS=PART_FIELDS,
            ALIGNED_RANKS=ALIGNED_RANKS, ROWS=TILE_ROWS, RANKS=rank_block, OUTPUTS=TILE_OUTPUTS, num_warps=8,
        )  # fmt: skip


def grouped_changes(layers: Sequence[AdaptedLayer], device: torch.device) -> list[LayerChange]:
    """Changes of all layers of a pack. All tables are uploaded at once."""
    values: list[int] = []
    known_tiles: dict[tuple[tuple[int, int], ...], slice] = {}
    described = []
    for layer in layers:
        segments = segments_of(layer)
        rows = tuple((segment.start, segment.stop) for segment in segments)
        if rows not in known_tiles:
            first = len(values)
            values.extend(value for tile in _tiles(rows) for value in tile)
            known_tiles[rows] = slice(first, len(values))
        part_outputs = _part_outputs(layer)
        most_entries = max((len(segment.adapters) for segment in segments), default=0)
        first = len(values)
        for segment in segments:
            values.extend(_entries(segment, layer.num_outputs // part_outputs, part_outputs, most_entries))
        described.append((layer, segments, known_tiles[rows], slice(first, len(values)), most_entries))
    table = to_device(torch.tensor(values, dtype=torch.int64), device)
    return [_change(table, *its) for its in described]


def _change(
    table: Tensor, layer: AdaptedLayer, segments: Sequence[Segment], tiles: slice, entries: slice, most_entries: int
) -> GroupedChange:
    num_parts = layer.num_outputs // _part_outputs(layer)
    size = ENTRY_FIELDS + PART_FIELDS * num_parts
    return GroupedChange(
        tiles=table[tiles].view(-1, TILE_FIELDS),
        entries=table[entries].view(len(segments), most_entries, size),
        num_parts=num_parts,
        most_ranks=max(len(weights.down) for weights, _ in layer.parts),
        width=max((sum(len(weights.down) for weights, _ in segment.adapters) for segment in segments), default=0),
        is_complete=layer.num_rows > 0 and _num_rows(segments) == layer.num_rows,
        is_aligned=all((up.ranks.stop - up.ranks.start) % ALIGNED_RANKS == 0 for w, _ in layer.parts for up in w.ups),
        weights=tuple(weights for weights, _ in layer.parts),
    )


def _part_outputs(layer: AdaptedLayer) -> int:
    """Outputs of one part; all parts have the same number."""
    columns = layer.parts[0][0].ups[0].columns
    return int(columns.stop - columns.start)


def _tiles(rows: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    for number, (start, stop) in enumerate(rows):
        for first in range(start, stop, TILE_ROWS):
            yield first, min(first + TILE_ROWS, stop), number


def _entries(segment: Segment, num_parts: int, part_outputs: int, most_entries: int) -> Iterator[int]:
    """Entries of a segment, with ranks of 0 for adapters that it does not have."""
    column = 0
    for weights, scale in segment.adapters:
        down, ups = weights.addresses
        yield from (struct.unpack("<i", struct.pack("<f", scale))[0], column, down, len(weights.down))
        ranks = {up.columns.start: up.ranks for up in weights.ups}
        for first in range(0, num_parts * part_outputs, part_outputs):
            its = ranks.get(first, slice(0, 0))
            yield from (ups.get(first, 0), its.start, its.stop - its.start)
        column += len(weights.down)
    yield from [0] * (ENTRY_FIELDS + PART_FIELDS * num_parts) * (most_entries - len(segment.adapters))


@triton.jit(
    do_not_specialize=["num_rows", "num_entries", "entry_size", "rank_blocks"],
    do_not_specialize_on_alignment=["tiles_ptr", "entries_ptr"],  # views of one table, at any offset
)
def _shrink(
    x_ptr, x_scales_ptr, out_ptr, tiles_ptr, entries_ptr, num_rows, num_inputs, split_inputs, width, num_entries,
    entry_size, rank_blocks,
    HAS_SCALES: tl.constexpr, DTYPE: tl.constexpr, TILE_FIELDS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
    INPUTS: tl.constexpr,
):  # fmt: skip
    """Program (tile, entry and block of ranks, split of the inputs)."""
    tile_ptr = tiles_ptr + tl.program_id(0) * TILE_FIELDS
    start = tl.load(tile_ptr)
    stop = tl.load(tile_ptr + 1)
    entry = tl.load(tile_ptr + 2) * num_entries + tl.program_id(1) // rank_blocks
    entry_ptr = entries_ptr + entry * entry_size
    split = tl.program_id(2)
    ranks = tl.program_id(1) % rank_blocks * RANKS + tl.arange(0, RANKS)
    num_ranks = tl.load(entry_ptr + 3)
    if tl.program_id(1) % rank_blocks * RANKS < num_ranks:
        scale = tl.load(entry_ptr).to(tl.int32).to(tl.float32, bitcast=True)
        first_column = tl.load(entry_ptr + 1)
        down_ptr = tl.multiple_of(tl.load(entry_ptr + 2).to(tl.pointer_type(DTYPE)), 16)
        rows = start + tl.arange(0, ROWS)
        total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
        first = split * split_inputs
        last = tl.minimum(first + split_inputs, num_inputs)
        for at in range(first, last, INPUTS):
            inputs = at + tl.arange(0, INPUTS)
            x = tl.load(
                x_ptr + rows[:, None] * num_inputs + inputs[None, :],
                mask=(rows < stop)[:, None] & (inputs < num_inputs)[None, :],
                other=0.0,
            ).to(DTYPE)
            down = tl.load(
                down_ptr + ranks[None, :] * num_inputs + inputs[:, None],
                mask=(ranks < num_ranks)[None, :] & (inputs < num_inputs)[:, None],
                other=0.0,
            )
            total = tl.dot(x, down, total, input_precision="ieee")
        total *= scale
        if HAS_SCALES:
            total *= tl.load(x_scales_ptr + rows, mask=rows < stop, other=0.0)[:, None]
        tl.store(
            out_ptr + (split * num_rows + rows)[:, None] * width + (first_column + ranks)[None, :],
            total,
            mask=(rows < stop)[:, None] & (ranks < num_ranks)[None, :],
        )


@triton.jit(
    do_not_specialize=["num_rows", "num_splits", "num_entries", "entry_size", "output_blocks"],
    do_not_specialize_on_alignment=["tiles_ptr", "entries_ptr"],
)
def _expand(
    y_ptr, bias_ptr, shrunk_ptr, tiles_ptr, entries_ptr, num_rows, part_outputs, num_outputs, width, num_splits,
    num_entries, entry_size, output_blocks,
    HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, ACTIVATES: tl.constexpr, IS_ALIGNED: tl.constexpr, DTYPE: tl.constexpr,
    TILE_FIELDS: tl.constexpr, ENTRY_FIELDS: tl.constexpr, PART_FIELDS: tl.constexpr, ALIGNED_RANKS: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Program (tile, part and block of its outputs)."""
    tile_ptr = tiles_ptr + tl.program_id(0) * TILE_FIELDS
    start = tl.load(tile_ptr)
    stop = tl.load(tile_ptr + 1)
    first_entry = tl.load(tile_ptr + 2) * num_entries
    part = tl.program_id(1) // output_blocks
    outputs = tl.program_id(1) % output_blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = start + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    num_changes = 0
    for number in range(num_entries):
        entry_ptr = entries_ptr + (first_entry + number) * entry_size
        up_entry_ptr = entry_ptr + ENTRY_FIELDS + part * PART_FIELDS
        num_ranks = tl.load(up_entry_ptr + 2).to(tl.int32)
        first_column = tl.load(entry_ptr + 1) + tl.load(up_entry_ptr + 1)
        up_ptr = tl.multiple_of(tl.load(up_entry_ptr).to(tl.pointer_type(DTYPE)), 16)
        num_changes += num_ranks
        if IS_ALIGNED:  # then a thread loads several ranks at once
            num_ranks = tl.multiple_of(num_ranks, ALIGNED_RANKS)
            first_column = tl.multiple_of(first_column, ALIGNED_RANKS)
        for first in range(0, num_ranks, RANKS):
            ranks = first + tl.arange(0, RANKS)
            inside = (rows < stop)[:, None] & (ranks < num_ranks)[None, :]
            columns = (first_column + ranks)[None, :]
            shrunk = tl.load(shrunk_ptr + rows[:, None] * width + columns, mask=inside, other=0.0)
            for split in range(1, num_splits):
                shrunk += tl.load(
                    shrunk_ptr + (split * num_rows + rows)[:, None] * width + columns, mask=inside, other=0.0
                )
            up = tl.load(
                up_ptr + outputs[None, :] * num_ranks + ranks[:, None],
                mask=(outputs < part_outputs)[None, :] & (ranks < num_ranks)[:, None],
                other=0.0,
            )
            total = tl.dot(shrunk.to(DTYPE), up, total, input_precision="ieee")
    targets = y_ptr + rows[:, None] * num_outputs + (part * part_outputs + outputs)[None, :]
    if ADDS and not ACTIVATES:
        stop = tl.where(num_changes > 0, stop, start)  # leave a part that no adapter of the segment changes
    inside = (rows < stop)[:, None] & (outputs < part_outputs)[None, :]
    if ADDS:
        total += tl.load(targets, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + part * part_outputs + outputs, mask=outputs < part_outputs, other=0.0)
        total += bias.to(tl.float32)[None, :]
    if ACTIVATES:
        total = gelu_by_tanh(total)
    tl.store(targets, total.to(DTYPE), mask=inside)
