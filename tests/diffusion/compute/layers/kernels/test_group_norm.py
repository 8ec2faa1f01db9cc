"""GroupNorm in channels-last memory against PyTorch's: on a GPU, where there is none in Triton's interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.diffusion.compute.layers.kernels.test_fused import DEVICE, DTYPES, EPS, assert_near, random
from vllm_omni.diffusion.compute.layers.kernels import TorchKernels, create_kernels
from vllm_omni.diffusion.compute.layers.kernels import group_norm as kernel

# In the interpreter NumPy warns of infinities and of what is no number.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPES = [
    ((1, 96, 7, 13), 32),  # channels that are no power of 2
    ((2, 16, 9, 5), 8),
    ((2, 24, 5, 3), 8),  # groups of 3 channels
    ((1, 33, 6, 6), 1),
    ((3, 40, 1, 1), 4),  # one pixel
    ((1, 8, 23, 60), 2),  # more than one tile of pixels, and less than two
    ((2, 1, 4, 4), 1),
    ((1, 16, 1, 9), 16),
]


@pytest.fixture(scope="module")
def fused() -> Any:
    return create_kernels("triton")


def exact(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, silu: bool) -> Tensor:
    weight, bias = (None if values is None else values.double() for values in (weight, bias))
    return TorchKernels().group_norm(x.double(), num_groups, weight, bias, EPS, silu)


def cases() -> Iterator[Any]:
    """Every shape, each with one dtype, with or without SiLU; the layouts' run has all combinations."""
    kinds = list(itertools.product(DTYPES, (False, True)))
    for number, (shape, num_groups) in enumerate(SHAPES):
        for kind, (dtype, silu) in enumerate(kinds):
            marks = () if kind == number % len(kinds) else (pytest.mark.layouts,)
            yield pytest.param(dtype, silu, shape, num_groups, marks=marks)


@pytest.mark.parametrize(("dtype", "silu", "shape", "num_groups"), list(cases()))
def test_values_and_memory(
    fused: Any, dtype: torch.dtype, silu: bool, shape: tuple[int, int, int, int], num_groups: int
) -> None:
    x = random(*shape, dtype=dtype).to(memory_format=torch.channels_last)
    weight, bias = random(shape[1], dtype=dtype, seed=1), random(shape[1], dtype=dtype, seed=2)
    got = fused.group_norm(x, num_groups, weight, bias, EPS, silu)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_near(got, exact(x, num_groups, weight, bias, silu), dtype)
    contiguous = fused.group_norm(x.contiguous(), num_groups, weight, bias, EPS, silu)
    assert torch.equal(got, contiguous)


@pytest.mark.parametrize("affine", ["neither", "weight", "bias"])
def test_without_weight_or_bias(fused: Any, affine: str) -> None:
    x = random(1, 12, 3, 3)
    weight = random(12, seed=1) if affine == "weight" else None
    bias = random(12, seed=2) if affine == "bias" else None
    assert_near(fused.group_norm(x, 3, weight, bias, EPS), exact(x, 3, weight, bias, False), x.dtype)


def test_sequences_as_attention_has_them(fused: Any) -> None:
    x = random(2, 11, 24).transpose(1, 2)  # [N, channels, tokens] of [N, tokens, channels]
    got = fused.group_norm(x, 4, None, None, EPS)
    assert got.transpose(1, 2).is_contiguous()
    assert_near(got, exact(x, 4, None, None, False), x.dtype)


@pytest.mark.parametrize("max_blocks", [1, 3, pytest.param(2048, marks=pytest.mark.thorough)])
def test_statistics_far_from_zero(fused: Any, monkeypatch: pytest.MonkeyPatch, max_blocks: int) -> None:
    """A mean of 100 and a deviation of 1: sums of squares in float32 would lose the variance's last digits."""
    monkeypatch.setattr(kernel, "MAX_BLOCKS", max_blocks)
    monkeypatch.setattr(kernel, "TILE", 64)
    monkeypatch.setattr(kernel, "COMBINED", 32)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn((2, 12, 19, 17), generator=generator) + 100).to(DEVICE)
    x[1, :, :2] = 0  # the first block says nothing of the others
    error = (fused.group_norm(x, 4, None, None, EPS).double() - exact(x, 4, None, None, False)).abs()
    # The mean itself is rounded to 2**-18, of deviations of 1 in the first sample.
    assert error[0].max() <= 1.5e-5
    assert error[1].max() <= 1e-5


def test_a_constant_picture_and_one_with_infinities(fused: Any) -> None:
    bias = random(24)
    constant = fused.group_norm(torch.full((1, 24, 23, 61), 7.3, device=DEVICE), 8, None, bias, EPS)
    torch.testing.assert_close(constant, bias[None, :, None, None].expand(1, 24, 23, 61))
    bias = random(8)
    x = random(1, 8, 5, 5)
    x[0, 1, 2, 2] = torch.inf
    got = fused.group_norm(x, 2, None, bias, EPS)
    assert got[:, :4].isnan().all()
    assert_near(got[:, 4:], exact(x, 2, None, bias, False)[:, 4:], x.dtype)


def test_a_picture_does_not_depend_on_its_batch(fused: Any) -> None:
    x = random(3, 16, 20, 33).to(memory_format=torch.channels_last)
    together = fused.group_norm(x, 4, None, None, EPS, True)
    assert torch.equal(together[1:2], fused.group_norm(x[1:2], 4, None, None, EPS, True))


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
def test_no_pixels_are_no_work(fused: Any, shape: tuple[int, int, int, int]) -> None:
    assert fused.group_norm(torch.empty(shape, device=DEVICE), 2, None, None, EPS).shape == shape
