"""The kernels of low-rank changes against plain PyTorch: on a GPU where there is one, otherwise in the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.diffusion.compute.layers.kernels.test_fused import DEVICE, DTYPES, LIMITS, random
from vllm_omni.diffusion.compute.layers.kernels import low_rank
from vllm_omni.diffusion.compute.layers.kernels.low_rank import TILE_ROWS, grouped_changes, segments_of
from vllm_omni.diffusion.compute.layers.low_rank import (
    AdaptedLayer,
    LayerWeights,
    RowRange,
    UpWeight,
    torch_changes,
)
from vllm_omni.diffusion.compute.layers.rounding import Float8Rows

INPUTS, OUTPUTS = 48, 40
"""Sizes of one part."""
LONG = TILE_ROWS + 9
NUM_ROWS = LONG + 30
UNCHANGED = slice(LONG + 17, LONG + 27)


def weights_of(ranks: Sequence[int], dtype: torch.dtype, seed: int, num_inputs: int = INPUTS) -> LayerWeights:
    """Weights of a layer with parts side by side. ranks: of each part; 0: the adapter leaves it."""
    ups, first = [], 0
    for part, rank in enumerate(ranks):
        if rank:
            columns = slice(part * OUTPUTS, (part + 1) * OUTPUTS)
            weight = random(OUTPUTS, rank, dtype=dtype, seed=seed + part)
            ups.append(UpWeight(columns, slice(first, first + rank), weight))
        first += rank
    return LayerWeights(random(first, num_inputs, dtype=dtype, seed=seed) / num_inputs, tuple(ups))


def layer_of(dtype: torch.dtype, is_complete: bool) -> AdaptedLayer:
    """Adapters of several ranks: alone, two on a sequence, with other scales, of some parts, and on no row."""
    first, second = weights_of((4, 4), dtype, 1), weights_of((0, 17), dtype, 2)
    third, unchanged = weights_of((140, 3, 0), dtype, 3), RowRange(UNCHANGED.start, UNCHANGED.stop, 1.5)
    return AdaptedLayer(
        [
            (first, (RowRange(0, 5, 1.0), RowRange(5, 5 + LONG, 1.0), RowRange(5 + LONG, LONG + 17, -0.5))),
            (second, (RowRange(5, 5 + LONG, 2.0), RowRange(LONG + 27, NUM_ROWS, 0.3))),
            (third, (*([unchanged] if is_complete else []), RowRange(LONG + 27, NUM_ROWS, 0.7))),
            (weights_of((2, 2), dtype, 4), (RowRange(NUM_ROWS, NUM_ROWS, 1.0),)),
        ],
        num_rows=NUM_ROWS,
        num_outputs=2 * OUTPUTS,
    )


# The interpreter is slow, and multiplies no matrices in bfloat16.
@pytest.mark.parametrize("dtype", DTYPES if DEVICE.type == "cuda" else [torch.float32])
@pytest.mark.parametrize("is_complete", [False, True])
def test_as_pytorch_computes(dtype: torch.dtype, is_complete: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _compute_several_blocks(monkeypatch)
    layer = layer_of(dtype, is_complete)
    (grouped,), (exact,) = grouped_changes([layer], DEVICE), torch_changes([_in_float64(layer)], DEVICE)
    x = random(NUM_ROWS, INPUTS, dtype=dtype)
    if is_complete:
        weight = random(2 * OUTPUTS, INPUTS, dtype=dtype, seed=9) / INPUTS
        bias = random(2 * OUTPUTS, dtype=dtype)
        wanted = exact.linear(x.double(), weight.double(), bias.double())
        got = grouped.linear(x, weight, bias)
    else:
        y, rounded = random(NUM_ROWS, 2 * OUTPUTS, dtype=dtype), Float8Rows.of(x)
        wanted = exact.add_to(y.double(), rounded.values.double() * rounded.scale.double())
        got = grouped.add_to(y.clone(), rounded)
        assert torch.equal(got[UNCHANGED], y[UNCHANGED]), "rows without adapters are not touched"
    assert got.dtype == dtype
    assert (got.double() - wanted).norm() <= 2 * LIMITS[dtype] * wanted.norm()


def test_long_rows_are_split_and_an_empty_pack_is_left() -> None:
    many = weights_of((5,), torch.float32, 1, 2000)
    full = AdaptedLayer([(many, (RowRange(0, 3, 1.0), RowRange(3, 7, 1.0)))], 7, OUTPUTS)
    gap = AdaptedLayer([(many, (RowRange(0, 3, 1.0), RowRange(5, 7, 1.0)))], 7, OUTPUTS, gaps=((3, 5),))
    none = AdaptedLayer([(many, (RowRange(0, 0, 1.0),))], 0, OUTPUTS)
    assert [(segment.start, segment.stop) for segment in segments_of(full)] == [(0, 7)]
    assert [(segment.start, segment.stop) for segment in segments_of(gap)] == [(0, 3), (3, 5), (5, 7)]
    x, weight = random(7, 2000), random(OUTPUTS, 2000) / 2000
    changes, exact = grouped_changes([full, none, gap], DEVICE), torch_changes([full], DEVICE)[0]
    wanted = exact.linear(x, weight, None)
    assert (changes[0].linear(x, weight, None) - wanted).norm() <= 1e-5 * wanted.norm()
    around = changes[2].linear(x, weight, None) - wanted
    assert around[[0, 1, 2, 5, 6]].norm() <= 1e-5 * wanted.norm()
    assert changes[1].linear(x[:0], weight, None).shape == (0, OUTPUTS)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("ranks", [(16, 16), (3, 0), (9, 17), (70, 3)])
def test_a_program_computes_several_blocks_of_outputs(
    ranks: tuple[int, int], adds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 64 ranks: a program reads its rows of s once for all blocks. The last block is not full."""
    _compute_several_blocks(monkeypatch)
    ranges = (RowRange(0, 3, 1.0), RowRange(3, NUM_ROWS, -0.5))
    layer = AdaptedLayer([(weights_of(ranks, torch.float32, 1), ranges)], NUM_ROWS, 2 * OUTPUTS)
    (grouped,), (exact,) = grouped_changes([layer], DEVICE), torch_changes([_in_float64(layer)], DEVICE)
    x, y, weight = random(NUM_ROWS, INPUTS), random(NUM_ROWS, 2 * OUTPUTS), random(2 * OUTPUTS, INPUTS) / INPUTS
    if adds:
        wanted, got = exact.add_to(y.double(), x.double()), grouped.add_to(y.clone(), x)
    else:
        bias = random(2 * OUTPUTS)
        wanted, got = exact.linear(x.double(), weight.double(), bias.double()), grouped.linear(x, weight, bias)
    assert (got.double() - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("num_adapters", [1, 2])
@pytest.mark.parametrize("num_ranks", [16, 32, 64, 144])
def test_what_usual_ranks_need_is_compiled_before(
    num_ranks: int, num_adapters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[set[tuple[object, ...]]] = [set()]

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **constants: launched[-1].add((self.name, *sorted(constants.items(), key=str)))

    for name in ("_shrink", "_expand"):
        monkeypatch.setattr(low_rank, name, Recorder(name))
    low_rank.compile_changes(torch.float32, is_float8=True, device=DEVICE)
    launched.append(set())
    adapters = [(weights_of((num_ranks,), torch.float32, i), (RowRange(0, 9, 1.0),)) for i in range(num_adapters)]
    layer = AdaptedLayer(adapters, 9, OUTPUTS)
    (change,) = grouped_changes([layer], DEVICE)
    x, weight, bias = random(9, INPUTS), random(OUTPUTS, INPUTS), random(OUTPUTS)
    for y in (change.linear(x, weight, None), change.linear(x, weight, bias)):
        change.add_to(y, Float8Rows.of(x))
    before, needed = launched
    assert len(needed) == 5
    assert needed <= before


def _in_float64(layer: AdaptedLayer) -> AdaptedLayer:
    def wide(weights: LayerWeights) -> LayerWeights:
        ups = (UpWeight(up.columns, up.ranks, up.weight.double()) for up in weights.ups)
        return LayerWeights(weights.down.double(), tuple(ups))

    return AdaptedLayer([(wide(its), ranges) for its, ranges in layer.parts], layer.num_rows, layer.num_outputs)


def _compute_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program compute two blocks of outputs, of the three of a part."""
    monkeypatch.setattr(low_rank, "EXPAND", low_rank.EXPAND._replace(outputs=32, most_blocks=2, programs=3))
