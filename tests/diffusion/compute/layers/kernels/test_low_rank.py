"""The kernels of low-rank changes against plain PyTorch: on a GPU where there is one, otherwise in the interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from tests.diffusion.compute.layers.kernels.test_fused import DEVICE, DTYPES, LIMITS, random
from vllm_omni.diffusion.compute.layers.kernels.low_rank import TILE_ROWS, grouped_changes, segments_of
from vllm_omni.diffusion.compute.layers.low_rank import (
    AdaptedLayer,
    LayerWeights,
    RowRange,
    UpWeight,
    torch_changes,
)
from vllm_omni.diffusion.compute.layers.rounding import Float8Rows

# In the interpreter NumPy warns of infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
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
def test_as_pytorch_computes(dtype: torch.dtype, is_complete: bool) -> None:
    layer = layer_of(dtype, is_complete)
    (grouped,), (exact,) = grouped_changes([layer], DEVICE), torch_changes([_in_float64(layer)], DEVICE)
    x = random(NUM_ROWS, INPUTS, dtype=dtype)
    if is_complete:
        weight = random(2 * OUTPUTS, INPUTS, dtype=dtype, seed=9) / INPUTS
        bias = random(2 * OUTPUTS, dtype=dtype)
        wanted = exact.linear(x.double(), weight.double(), bias.double())
        got = grouped.linear(x, weight, bias)
        activated = grouped.linear_gelu(x, weight, bias)
        assert activated is not None
        exact_gelu = F.gelu(wanted, approximate="tanh")
        assert (activated.double() - exact_gelu).norm() <= 2 * LIMITS[dtype] * exact_gelu.norm()
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


def _in_float64(layer: AdaptedLayer) -> AdaptedLayer:
    def wide(weights: LayerWeights) -> LayerWeights:
        ups = (UpWeight(up.columns, up.ranks, up.weight.double()) for up in weights.ups)
        return LayerWeights(weights.down.double(), tuple(ups))

    return AdaptedLayer([(wide(its), ranges) for its, ranges in layer.parts], layer.num_rows, layer.num_outputs)
