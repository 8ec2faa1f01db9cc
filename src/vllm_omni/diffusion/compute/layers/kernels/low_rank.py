"""Triton kernels of low-rank changes: one launch with A and one with B for all adapters and parts of a layer.

A *segment* is a run of rows with the same adapters and scales. Its rows are cut into tiles. Tables on the device say
which rows a tile has, and where the weights of its segment's adapters are: ranks differ from adapter to adapter, and
an adapter may change some parts of a layer only.

    shrink:  s[rows, ranks] = scale * x[rows] A^T    in float32, a summand for each split of the inputs
    expand:  y[rows] += s B^T, or y[rows] = bias + s B^T before the layer's own product is added
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.layers.low_rank import AdaptedLayer, LayerChange, LayerWeights, RowRange, UpWeight
from vllm_omni.diffusion.compute.layers.rounding import Float8Rows, Rows

TILE_ROWS = 64
RANK_BLOCKS = (16, 64, 128)
"""Ranks that a program computes at once: few numbers, because each is a compilation. More ranks take turns."""
MAX_SPLITS = 16
SPLITS_AT_ONCE = 4
"""Splits of s that an expand loads before it adds the first of them."""
ALIGNED_RANKS = 8
"""Ranks in 16 bytes of bfloat16, which a thread loads at once."""
TILE_FIELDS = 3
"""Fields of a tile: first row, end of the rows, number of the segment."""
ENTRY_FIELDS = 4
"""Fields of an entry: bits of the scale, first column in s, address of A, rows of A. Then those of each part."""
PART_FIELDS = 3
"""Fields of a part of an entry: address of B, its first row of A, its rows of A."""
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class ShrinkLaunch(NamedTuple):
    """Constants of `_shrink` in bfloat16 with up to 64 ranks; more ranks and float32 have half of the inputs each."""

    inputs: int
    """Inputs that a program multiplies at once."""
    programs: int
    """Programs that keep a GPU busy. Inputs are split as long as the programs do not exceed them."""
    num_warps: int
    num_stages: int
    """Blocks of inputs in shared memory: one is used, the others are loaded ahead."""


class ExpandLaunch(NamedTuple):
    """Constants of `_expand` in bfloat16; float32 has half of the outputs."""

    outputs: int
    """Outputs of a block."""
    most_blocks: int
    """Most blocks of outputs of a program, one after another. They share one read of s and of the tables."""
    programs: int
    """Programs that keep a GPU busy. Programs take several blocks as long as there are no fewer programs."""
    num_warps: int
    num_stages: int
    """Blocks of B in shared memory: one is used, the others are loaded ahead."""


# 264 programs: two on each multiprocessor of the largest GPUs.
SHRINK = ShrinkLaunch(inputs=128, programs=264, num_warps=4, num_stages=3)
EXPAND = ExpandLaunch(outputs=128, most_blocks=8, programs=528, num_warps=4, num_stages=4)


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
    most_part_ranks: int
    """Most ranks of one B."""
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

    def add_to(self, y: Tensor, x: Rows) -> Tensor:
        if len(self.tiles):
            self._expand(y, self._shrink(x), None, adds=True)
        return y

    def _shrink(self, x: Rows) -> Tensor:
        """Summands of s: float32 [splits, rows, width]. Other than the segments' rows and ranks are undefined."""
        values, scales, dtype = x if isinstance(x, Float8Rows) else (x.contiguous(), None, x.dtype)
        num_rows, num_inputs = values.shape
        rank_block = _rank_block(self.most_ranks, RANK_BLOCKS)
        rank_blocks = triton.cdiv(self.most_ranks, rank_block)
        halvings = int(rank_block == RANK_BLOCKS[-1]) + int(dtype == torch.float32)
        input_block = SHRINK.inputs >> halvings
        programs = len(self.tiles) * self.entries.shape[1] * rank_blocks
        splits = min(max(SHRINK.programs // programs, 1), MAX_SPLITS, triton.cdiv(num_inputs, 2 * input_block))
        split_inputs = triton.cdiv(triton.cdiv(num_inputs, splits), input_block) * input_block
        splits = triton.cdiv(num_inputs, split_inputs)
        shrunk = values.new_empty((splits, num_rows, self.width), dtype=torch.float32)
        _shrink[(len(self.tiles), self.entries.shape[1] * rank_blocks, splits)](
            values, scales, shrunk, self.tiles, self.entries, num_rows, num_inputs, split_inputs, self.width,
            self.entries.shape[1], self.entries.shape[2], rank_blocks,
            HAS_SCALES=scales is not None, DTYPE=TRITON_DTYPES[dtype], TILE_FIELDS=TILE_FIELDS, ROWS=TILE_ROWS,
            RANKS=rank_block, INPUTS=input_block, num_warps=SHRINK.num_warps, num_stages=SHRINK.num_stages,
        )  # fmt: skip
        return shrunk

    def _expand(self, y: Tensor, shrunk: Tensor, bias: Tensor | None, adds: bool) -> None:
        output_block = EXPAND.outputs // (2 if y.dtype == torch.float32 else 1)
        splits, num_rows, _ = shrunk.shape
        part_outputs = y.shape[1] // self.num_parts
        blocks = triton.cdiv(part_outputs, output_block)
        blocks_each = min(max(len(self.tiles) * self.num_parts * blocks // EXPAND.programs, 1), EXPAND.most_blocks)
        programs_each = triton.cdiv(blocks, blocks_each)
        rank_block = _rank_block(self.most_part_ranks, RANK_BLOCKS[:-1])
        _expand[(len(self.tiles), self.num_parts * programs_each)](
            y, bias, shrunk, self.tiles, self.entries, num_rows, part_outputs, y.shape[1], self.width, splits,
            self.entries.shape[1], self.entries.shape[2], blocks_each, programs_each,
            HAS_BIAS=bias is not None, ADDS=adds, IS_ALIGNED=self.is_aligned,
            IS_SINGLE=self.entries.shape[1] == 1 and self.most_part_ranks <= rank_block,
            DTYPE=TRITON_DTYPES[y.dtype], TILE_FIELDS=TILE_FIELDS, ENTRY_FIELDS=ENTRY_FIELDS, PART_FIELDS=PART_FIELDS,
            ALIGNED_RANKS=ALIGNED_RANKS, ROWS=TILE_ROWS, RANKS=rank_block, OUTPUTS=output_block,
            SPLITS_AT_ONCE=SPLITS_AT_ONCE, num_warps=EXPAND.num_warps, num_stages=EXPAND.num_stages,
        )  # fmt: skip


def _rank_block(num_ranks: int, blocks: Sequence[int]) -> int:
    return next((block for block in blocks if num_ranks <= block), blocks[-1])


def compile_changes(dtype: torch.dtype, is_float8: bool, device: torch.device) -> None:
    """Run the kernels once for each block of ranks, with one adapter and several, so that no request waits for Triton.

    Ranks that are no multiple of 16 are compiled when they come. is_float8: whether some layers are in float8.
    """
    x, weight = (torch.zeros((rows, 128), dtype=dtype, device=device) for rows in (2, EXPAND.outputs))
    bias = torch.zeros(len(weight), dtype=dtype, device=device)
    for num_ranks, num_adapters in product(RANK_BLOCKS, (1, 2)):
        down, up = (
            torch.zeros(size, dtype=dtype, device=device) for size in ((num_ranks, 128), (len(bias), num_ranks))
        )
        weights = LayerWeights(down, (UpWeight(slice(0, len(bias)), slice(0, num_ranks), up),))
        layer = AdaptedLayer([(weights, (RowRange(0, 2, 1.0),))] * num_adapters, 2, len(bias))
        (change,) = grouped_changes([layer], device)
        change.linear(x, weight, None)
        y = change.linear(x, weight, bias)
        change.add_to(y, x)
        if is_float8:
            change.add_to(y, Float8Rows.of(x))


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
        most_part_ranks=max(up.ranks.stop - up.ranks.start for weights, _ in layer.parts for up in weights.ups),
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
    num_inside = (tl.load(tile_ptr + 1) - start).to(tl.int32)
    entry = tl.load(tile_ptr + 2) * num_entries + tl.program_id(1) // rank_blocks
    entry_ptr = entries_ptr + entry * entry_size
    split = tl.program_id(2)
    ranks = tl.program_id(1) % rank_blocks * RANKS + tl.arange(0, RANKS)
    num_ranks = tl.load(entry_ptr + 3)
    if tl.program_id(1) % rank_blocks * RANKS < num_ranks:
        scale = tl.load(entry_ptr).to(tl.int32).to(tl.float32, bitcast=True)
        first_column = tl.load(entry_ptr + 1)
        down_ptr = tl.multiple_of(tl.load(entry_ptr + 2).to(tl.pointer_type(DTYPE)), 16)
        rows = tl.arange(0, ROWS)
        # 64 bits where the tile begins, 32 within it: few registers, and no limit to the size of x.
        x_ptr += start * num_inputs
        total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
        first = split * split_inputs
        last = tl.minimum(first + split_inputs, num_inputs)
        for at in range(first, last, INPUTS):
            inputs = at + tl.arange(0, INPUTS)
            x = tl.load(
                x_ptr + rows[:, None] * num_inputs + inputs[None, :],
                mask=(rows < num_inside)[:, None] & (inputs < num_inputs)[None, :],
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
            total *= tl.load(x_scales_ptr + start + rows, mask=rows < num_inside, other=0.0)[:, None]
        tl.store(
            out_ptr + (split * num_rows + start) * width + rows[:, None] * width + (first_column + ranks)[None, :],
            total,
            mask=(rows < num_inside)[:, None] & (ranks < num_ranks)[None, :],
        )


@triton.jit(
    do_not_specialize=["num_rows", "num_splits", "num_entries", "entry_size", "blocks_each", "programs_each"],
    do_not_specialize_on_alignment=["tiles_ptr", "entries_ptr"],
)
def _expand(
    y_ptr, bias_ptr, shrunk_ptr, tiles_ptr, entries_ptr, num_rows, part_outputs, num_outputs, width, num_splits,
    num_entries, entry_size, blocks_each, programs_each,
    HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, IS_ALIGNED: tl.constexpr, IS_SINGLE: tl.constexpr,
    DTYPE: tl.constexpr, TILE_FIELDS: tl.constexpr, ENTRY_FIELDS: tl.constexpr, PART_FIELDS: tl.constexpr,
    ALIGNED_RANKS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, OUTPUTS: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Program (tile, part and `blocks_each` blocks of its outputs). programs_each: programs of one tile and part.

    IS_SINGLE: a segment has at most one adapter, with at most RANKS ranks. Then a program reads its rows of s and its
    entry once for all of its blocks.
    """
    tile_ptr = tiles_ptr + tl.program_id(0) * TILE_FIELDS
    start = tl.load(tile_ptr)
    num_inside = (tl.load(tile_ptr + 1) - start).to(tl.int32)
    rows = tl.arange(0, ROWS)
    part = tl.program_id(1) // programs_each
    entry_ptr = entries_ptr + tl.load(tile_ptr + 2) * num_entries * entry_size
    up_entry_ptr = entry_ptr + ENTRY_FIELDS + part * PART_FIELDS
    shrunk_ptr += start * width
    if IS_SINGLE:
        num_ranks, first_column, up_ptr = _up_entry(entry_ptr, up_entry_ptr, DTYPE, IS_ALIGNED, ALIGNED_RANKS)
        inside = (rows < num_inside)[:, None] & (tl.arange(0, RANKS) < num_ranks)[None, :]
        shrunk = _sum_splits(
            shrunk_ptr + first_column, rows, inside, num_rows, width, num_splits, RANKS, SPLITS_AT_ONCE
        ).to(DTYPE)
        num_changes = num_ranks
    else:
        num_changes = 0
        for number in range(num_entries):
            num_changes += tl.load(up_entry_ptr + number * entry_size + 2).to(tl.int32)
    if ADDS:
        num_inside = tl.where(num_changes > 0, num_inside, 0)  # leave a part that no adapter of the segment changes
    y_ptr += start * num_outputs + part * part_outputs
    first_output = tl.program_id(1) % programs_each * blocks_each * OUTPUTS
    if HAS_BIAS:
        bias_ptr += part * part_outputs
        next_bias = _load_bias(bias_ptr, first_output + tl.arange(0, OUTPUTS), part_outputs)
    for at in range(first_output, tl.minimum(first_output + blocks_each * OUTPUTS, part_outputs), OUTPUTS):
        outputs = at + tl.arange(0, OUTPUTS)
        # Loads that the compiler does not pipeline begin before the product.
        if ADDS:
            is_output = (rows < num_inside)[:, None] & (outputs < part_outputs)[None, :]
            y = tl.load(y_ptr + rows[:, None] * num_outputs + outputs[None, :], mask=is_output, other=0.0)
        if HAS_BIAS:
            bias = next_bias
            next_bias = _load_bias(bias_ptr, outputs + OUTPUTS, part_outputs)
        if IS_SINGLE:
            up = _load_up(up_ptr, outputs, tl.arange(0, RANKS), part_outputs, num_ranks)
            total = tl.dot(shrunk, up, input_precision="ieee")
        else:
            total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
            for number in range(num_entries):
                skipped = number * entry_size
                num_ranks, first_column, up_ptr = _up_entry(
                    entry_ptr + skipped, up_entry_ptr + skipped, DTYPE, IS_ALIGNED, ALIGNED_RANKS
                )
                for first in range(0, num_ranks, RANKS):
                    ranks = first + tl.arange(0, RANKS)
                    inside = (rows < num_inside)[:, None] & (ranks < num_ranks)[None, :]
                    shrunk = _sum_splits(
                        shrunk_ptr + first_column + first, rows, inside, num_rows, width, num_splits, RANKS,
                        SPLITS_AT_ONCE,
                    )  # fmt: skip
                    up = _load_up(up_ptr, outputs, ranks, part_outputs, num_ranks)
                    total = tl.dot(shrunk.to(DTYPE), up, total, input_precision="ieee")
        if ADDS:
            total += y.to(tl.float32)
        if HAS_BIAS:
            total += bias.to(tl.float32)[None, :]
        is_output = (rows < num_inside)[:, None] & (outputs < part_outputs)[None, :]
        tl.store(y_ptr + rows[:, None] * num_outputs + outputs[None, :], total.to(DTYPE), mask=is_output)


@triton.jit
def _up_entry(
    entry_ptr, up_entry_ptr, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr, ALIGNED_RANKS: tl.constexpr
):  # fmt: skip
    """Ranks of an adapter for one part, their first column in s, and the address of B."""
    num_ranks = tl.load(up_entry_ptr + 2).to(tl.int32)
    first_column = (tl.load(entry_ptr + 1) + tl.load(up_entry_ptr + 1)).to(tl.int32)
    up_ptr = tl.multiple_of(tl.load(up_entry_ptr).to(tl.pointer_type(DTYPE)), 16)
    if IS_ALIGNED:  # then a thread loads several ranks at once
        num_ranks = tl.multiple_of(num_ranks, ALIGNED_RANKS)
        first_column = tl.multiple_of(first_column, ALIGNED_RANKS)
    return num_ranks, first_column, up_ptr


@triton.jit
def _sum_splits(
    shrunk_ptr, rows, inside, num_rows, width, num_splits, RANKS: tl.constexpr, SPLITS_AT_ONCE: tl.constexpr
):  # fmt: skip
    """Sum of the splits of s for some rows and RANKS columns: float32 [rows, RANKS].

    Several splits are loaded before the first is added, so that a program waits once for all of them.
    """
    offsets = rows[:, None] * width + tl.arange(0, RANKS)[None, :]
    total = tl.zeros(offsets.shape, dtype=tl.float32)
    for first in range(0, num_splits, SPLITS_AT_ONCE):
        for i in tl.static_range(SPLITS_AT_ONCE):
            split = first + i
            split_ptr = shrunk_ptr + split.to(tl.int64) * num_rows * width
            total += tl.load(split_ptr + offsets, mask=tl.where(split < num_splits, inside, False), other=0.0)
    return total


@triton.jit
def _load_up(up_ptr, outputs, ranks, part_outputs, num_ranks):
    """B^T for some outputs and ranks: [ranks, outputs]."""
    return tl.load(
        up_ptr + outputs[None, :] * num_ranks + ranks[:, None],
        mask=(outputs < part_outputs)[None, :] & (ranks < num_ranks)[:, None],
        other=0.0,
    )


@triton.jit
def _load_bias(bias_ptr, outputs, part_outputs):
    return tl.load(bias_ptr + outputs, mask=outputs < part_outputs, other=0.0)
