"""The fused kernels against plain PyTorch: on a GPU where there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_omni.diffusion.compute.layers.kernels import Projected, TorchKernels, create_kernels
from vllm_omni.diffusion.compute.layers.rope import axis_rotations
from vllm_omni.diffusion.compute.layers.rounding import LARGEST, Float8Rows

# In the interpreter NumPy warns of infinities and of what is no number.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def fused() -> Any:
    return create_kernels("triton")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * 2 + 0.5).to(DEVICE, dtype)


def assert_near(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Relative to the exact result in float64, in the sense of norms, and bounded for each element."""
    assert got.dtype == dtype
    assert got.shape == exact.shape
    error = got.double() - exact
    assert error.norm() <= LIMITS[dtype] * exact.norm()
    assert error.abs().max() <= 4 * LIMITS[dtype] * exact.abs().max()


def rows_of(num_tokens: int, num_rows: int) -> Tensor | None:
    if num_rows == 1:
        return None
    return (torch.arange(num_tokens, device=DEVICE) * 7) % num_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "width", "num_rows"), [(1, 8, 1), (5, 96, 1), (9, 33, 3), (4, 200, 2)])
def test_layer_norm_and_modulation(fused: Any, dtype: torch.dtype, num_tokens: int, width: int, num_rows: int) -> None:
    x = random(num_tokens, width, dtype=dtype)
    table = random(num_rows, 6, width, dtype=dtype, seed=1)
    shift, scale = table[:, 1], table[:, 4]  # as views with a stride, which is how a model keeps them
    rows = rows_of(num_tokens, num_rows)
    exact = TorchKernels().norm_modulate(x.double(), shift.double(), scale.double(), rows, EPS)
    assert isinstance(exact, Tensor)
    assert_near(fused.norm_modulate(x, shift, scale, rows, EPS), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_gelu(fused: Any, dtype: torch.dtype, has_bias: bool) -> None:
    x, bias = random(7, 200, dtype=dtype), random(200, dtype=dtype) if has_bias else None
    exact = TorchKernels().gelu(x.double(), None if bias is None else bias.double())
    assert isinstance(exact, Tensor)
    assert_near(fused.gelu(x, bias), exact, dtype)
    far = torch.tensor([[-1e4, 1e4, math.nan, math.inf, 0.0]], dtype=dtype, device=DEVICE)
    torch.testing.assert_close(fused.gelu(far, None), TorchKernels().gelu(far, None), equal_nan=True)


def assert_rounded(got: Float8Rows, exact: Tensor, dtype: torch.dtype) -> None:
    """`got` is `exact`, which is float64, up to the rounding of a row to float8 at a scale of its own."""
    assert got.dtype == dtype
    values, scale = got.values.double(), got.scale.double()
    largest = exact.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(scale, largest / LARGEST, rtol=2 * LIMITS[dtype], atol=1e-30)
    # Half of the last of 4 bits; below the smallest normal number, half of the smallest step.
    half_step = torch.maximum(exact.abs() * 2.0**-4, scale * 2.0**-10)
    is_near = (values * scale - exact).abs() <= half_step * (1 + 1e-5) + 2 * LIMITS[dtype] * largest
    assert (is_near | loses_a_carry(exact / scale)).all()


def loses_a_carry(x: Tensor) -> Tensor:
    """Mask of values that Triton's interpreter rounds wrongly: one rounded up to a power of 2 becomes half of it."""
    mantissa, _ = torch.frexp(x)
    return (mantissa.abs() >= 1 - 2.0**-5) & (DEVICE.type == "cpu")


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_results_rounded_for_the_product_behind(fused: Any, dtype: torch.dtype, num_rows: int) -> None:
    x, bias = random(9, 80, dtype=dtype), random(80, dtype=dtype, seed=1)
    table, rows = random(num_rows, 6, 80, dtype=dtype, seed=2), rows_of(9, num_rows)
    shift, scale = table[:, 1], table[:, 4]
    plain: Any = TorchKernels()
    exact = plain.norm_modulate(x.double(), shift.double(), scale.double(), rows, EPS)
    assert isinstance(exact, Tensor)
    for kernels in (fused, plain):
        assert_rounded(kernels.norm_modulate(x, shift, scale, rows, EPS, float8=True), exact, dtype)
    exact = plain.gelu(x.double(), bias.double())
    assert isinstance(exact, Tensor)
    for kernels in (fused, plain):
        assert_rounded(kernels.gelu(x, bias, float8=True), exact, dtype)
    positions = torch.tensor([4, 0, 8, 8], device=DEVICE)
    for kernels in (fused, plain):
        assert_rounded(kernels.round_rows(x), x.double(), dtype)
        assert_rounded(kernels.round_rows(x, positions), x.double()[positions], dtype)


def test_rows_are_rounded_to_the_same_values_with_zeros_and_what_is_no_number(fused: Any) -> None:
    x = random(6, 100, dtype=torch.bfloat16)
    x[1], x[2, 3], x[3, 4], x[4] = 0, math.nan, -math.inf, 1e-30
    got, wanted = fused.round_rows(x), TorchKernels().round_rows(x)
    clean = [0, 1, 4, 5]
    torch.testing.assert_close(got.scale[clean], wanted.scale[clean], rtol=3e-7, atol=0)
    # The last bit of a scale may differ, and with it what lies in the middle of two values.
    differ = got.values[clean].float() != wanted.values[clean].float()
    assert (differ & ~loses_a_carry((x.float() / wanted.scale)[clean])).sum() <= 4
    is_nan = (got.values.float() * got.scale).sum(dim=1).isnan().tolist()
    if DEVICE.type == "cpu":  # Triton's interpreter knows no float8 that is no number
        del is_nan[2]
        assert is_nan == [False, False, True, False, False]
    else:
        assert is_nan == [False, False, True, True, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_of_picked_rows_with_the_bias_that_was_left_out(fused: Any, dtype: torch.dtype) -> None:
    x, y, bias = random(3, 40, dtype=dtype), random(8, 40, dtype=dtype, seed=1), random(40, dtype=dtype)
    gate, positions = random(1, 40, dtype=dtype, seed=2), torch.tensor([7, 2, 5], device=DEVICE)
    exact = x.double() + gate.double() * (y.double()[positions] + bias.double())
    for kernels in (fused, TorchKernels()):
        assert_near(kernels.gated_add(x, y, gate, None, bias, positions), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "width", "num_rows"), [(1, 8, 1), (5, 96, 1), (9, 33, 3)])
def test_gated_residual(fused: Any, dtype: torch.dtype, num_tokens: int, width: int, num_rows: int) -> None:
    x, y = random(num_tokens, width, dtype=dtype), random(num_tokens, width, dtype=dtype, seed=1)
    gate = random(num_rows, 6, width, dtype=dtype, seed=2)[:, 2]
    rows = rows_of(num_tokens, num_rows)
    exact = TorchKernels().gated_add(x.double(), y.double(), gate.double(), rows)
    assert_near(fused.gated_add(x, y, gate, rows), exact, dtype)


def test_a_residual_of_float16_stays_finite(fused: Any) -> None:
    x = torch.full((2, 8), 60000.0, dtype=torch.float16, device=DEVICE)
    gate = torch.ones((1, 8), dtype=torch.float16, device=DEVICE)
    for kernels in (fused, TorchKernels()):
        assert kernels.gated_add(x, x, gate, None).tolist() == [[65504.0] * 8] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_none(fused: Any, dtype: torch.dtype) -> None:
    x = torch.tensor([[math.nan, 1.0]], dtype=dtype, device=DEVICE)
    for kernels in (fused, TorchKernels()):
        out = kernels.gated_add(x, torch.ones_like(x), torch.ones_like(x), None)
        assert out.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("lengths", "num_heads", "axes"),
    [((7,), 3, (2, 4, 2)), ((3, 5), 1, (8, 12, 12)), ((4, 9), 5, (4, 10, 10)), ((0, 6), 2, (8, 12, 12))],
)
def test_heads_in_the_order_of_attention(
    fused: Any, dtype: torch.dtype, lengths: tuple[int, ...], num_heads: int, axes: tuple[int, ...], has_bias: bool
) -> None:
    width, num_tokens = sum(axes), sum(lengths)
    features = 3 * num_heads * width
    streams = [
        Projected(
            random(n, features, dtype=dtype, seed=i),
            random(2 * width, dtype=dtype, seed=10 + i),
            random(features, dtype=dtype, seed=20 + i) if has_bias else None,
        )
        for i, n in enumerate(lengths)
    ]
    generator = torch.Generator().manual_seed(0)
    order = stream = None
    if len(lengths) > 1:
        order = torch.randperm(num_tokens, generator=generator).to(DEVICE)
        stream = (order >= lengths[0]).long()
    positions = torch.randint(0, 40, (num_tokens, 3), generator=generator)
    rotations = axis_rotations(positions, axes)[:, None, None].to(DEVICE)
    exact = [
        Projected(s.qkv.double(), s.weight.double(), s.bias if s.bias is None else s.bias.double()) for s in streams
    ]
    # `rotate` computes in float32, whatever it is given.
    expected = TorchKernels().heads(exact, order, stream, rotations, EPS)
    got = fused.heads(streams, order, stream, rotations, EPS)
    for part, whole in zip(got, expected, strict=True):
        assert_near(part, whole.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_squares", [False, True])
@pytest.mark.parametrize(("num_heads", "axes"), [(3, (2, 4, 2)), (5, (8, 4, 4)), (1, (10, 10, 12))])
def test_heads_normed_together(
    fused: Any, dtype: torch.dtype, num_heads: int, axes: tuple[int, ...], has_bias: bool, has_squares: bool
) -> None:
    width = num_heads * sum(axes)
    qkv, weight = random(6, 3 * width, dtype=dtype), random(2 * width, dtype=dtype, seed=1)
    bias = random(3 * width, dtype=dtype, seed=2) if has_bias else None
    squares = random(6, 2, seed=3).abs() + 0.5 if has_squares else None
    positions = torch.randint(0, 40, (6, 3), generator=torch.Generator().manual_seed(0))
    rotations = axis_rotations(positions, axes)[:, None, None].to(DEVICE)
    exact = Projected(qkv.double(), weight.double(), None if bias is None else bias.double())
    # `rotate` computes in float32, whatever it is given.
    expected = TorchKernels().wide_heads(exact, rotations, EPS, squares)
    for kernels in (fused, TorchKernels()):
        got = kernels.wide_heads(Projected(qkv, weight, bias), rotations, EPS, squares)
        for part, whole in zip(got, expected, strict=True):
            assert part.shape == (6, num_heads, sum(axes))
            assert_near(part, whole.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_norm_over_all_heads(fused: Any, dtype: torch.dtype, has_bias: bool) -> None:
    x, weight = random(5, 2, 33, dtype=dtype)[:, 1], random(33, dtype=dtype, seed=1)
    bias = random(33, dtype=dtype, seed=2) if has_bias else None
    y = x.double() if bias is None else x.double() + bias.double()
    squares = y.square().mean(dim=-1)
    for kernels in (fused, TorchKernels()):
        for factor in (None, 1.0, 4.0):
            known = None if factor is None else (factor * squares).float()
            exact = y * torch.rsqrt((factor or 1.0) * squares + EPS)[:, None] * weight.double()
            assert_near(kernels.wide_norm(x, weight, bias, EPS, known), exact, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_rows_of_a_wider_dtype_keep_theirs(fused: Any, dtype: torch.dtype, num_rows: int) -> None:
    """Modulation in float32 is not rounded to the dtype of the tokens before it is used."""
    rows = rows_of(9, num_rows)
    shift, scale, gate = (64 + 1e-2 * random(num_rows, 3, 96)).unbind(1)  # the dtypes would round it by more
    ones = torch.ones(9, 96, dtype=dtype, device=DEVICE)
    signs = ones.clone()
    signs[:, ::2] = -1  # normed: the same
    picked = [0] * 9 if rows is None else rows.tolist()
    for kernels in (fused, TorchKernels()):
        normed, added = (
            kernels.norm_modulate(signs, shift, scale, rows, EPS),
            kernels.gated_add(-64 * ones, ones, gate, rows),
        )
        assert isinstance(normed, Tensor)
        assert normed.dtype == added.dtype == dtype
        torch.testing.assert_close(normed.float()[:, ::2], (shift - scale)[picked, ::2], rtol=1e-2, atol=2e-4)
        torch.testing.assert_close(added.float(), (gate - 64)[picked], rtol=1e-2, atol=2e-4)


def test_no_tokens_are_no_work(fused: Any) -> None:
    none = random(0, 8)
    table = random(1, 8)
    assert fused.norm_modulate(none, table, table, None, EPS).shape == (0, 8)
    assert fused.gated_add(none, none, table, None).shape == (0, 8)
    assert fused.gelu(none, None).shape == (0, 8)
    rounded = fused.round_rows(none)
    assert (rounded.values.shape, rounded.scale.shape) == ((0, 8), (0, 1))
    rotations = torch.ones(0, 1, 1, 2, 2, device=DEVICE)
    q, k, v = fused.heads([Projected(random(0, 24), random(8))], None, None, rotations, EPS)
    assert q.shape == k.shape == v.shape == (0, 2, 4)
    q, k, v = fused.wide_heads(Projected(random(0, 24), random(16)), rotations, EPS)
    assert q.shape == k.shape == v.shape == (0, 2, 4)
    assert fused.wide_norm(none, random(8), None, EPS).shape == (0, 8)
