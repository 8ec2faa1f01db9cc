"""Float8 on a GPU: its own scaled product against the rounding that a CPU does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from testbed.runner_driver import psnr
from tests.float8 import layer_of
from vllm_omni import Omni
from vllm_omni.diffusion.catalog.find_folder import DEMO_MODEL_PATH
from vllm_omni.diffusion.compute.layers.rounding import quantize
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs a GPU that multiplies float8 with a scale a row",
)
BFLOAT16_ROUNDING = 2.0**-8
"""Half a step of bfloat16, as part of the value that is rounded."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def operands(tokens: int, inner: int, out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and channels of very different magnitudes, in bfloat16 on the CPU."""
    x = torch.randn(tokens, inner) * torch.logspace(-3, 3, tokens)[:, None]
    matrix = torch.randn(out, inner) * torch.logspace(-2, 0, out)[:, None]
    return x.bfloat16(), matrix.bfloat16(), torch.randn(out).bfloat16()


def test_rows_are_rounded_as_on_the_cpu() -> None:
    x, _, _ = operands(300, 3072, 16)
    x[5] = 0
    (values, scale), (wanted, wanted_scale) = quantize(x.cuda()), quantize(x)
    # GPUs divide by a constant by multiplying with its inverse: the last bit of a scale differs, and with it a tie.
    torch.testing.assert_close(scale.cpu(), wanted_scale, rtol=3e-7, atol=0)
    differ = values.cpu().float() != wanted.float()
    assert differ.float().mean() < 3e-3
    difference = values.cpu().float() * scale.cpu() - wanted.float() * wanted_scale
    assert (difference.abs() <= 2.0**-3 * x.float().abs() + wanted_scale * 2.0**-8).all()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("inner", "out"), [(16, 16), (48, 144), (192, 768), (3072, 9216), (5120, 3840), (12288, 3072)])
@pytest.mark.parametrize("tokens", [0, 1, 7, 77, 4096])
def test_the_scaled_product_is_the_rounded_one(tokens: int, inner: int, out: int, has_bias: bool) -> None:
    x, matrix, bias = operands(tokens, inner, out)
    weight, scale = quantize(matrix)
    given = bias if has_bias else None
    got = layer_of(weight.cuda(), scale.cuda(), None if given is None else given.cuda())(x.cuda())
    assert (got.dtype, got.shape) == (torch.bfloat16, (tokens, out))
    values, scales = (t.cpu() for t in quantize(x.cuda()))
    # On the GPU in float32, for a CPU takes long; its own float32 product is not a tensor core's.
    a, b = (values.float() * scales).cuda(), (weight.float() * scale).cuda()
    product = a @ b.T
    exact, rounded = product, product.abs()
    if given is not None:
        # The product is rounded before the bias is added, and that error stays when the bias cancels most of it.
        exact = product + given.cuda().float()
        rounded = rounded + exact.abs()
    # Fast accumulation keeps about 14 bits of a sum as large as its terms are together.
    terms = a.norm(dim=1, keepdim=True) * b.norm(dim=1)
    assert ((got.float() - exact).abs() <= BFLOAT16_ROUNDING * rounded + 2.0**-9 * terms).all()


def test_a_value_that_is_no_number_stays_in_its_row() -> None:
    x, matrix, _ = operands(40, 192, 64)
    weight, scale = (t.cuda() for t in quantize(matrix))
    clean = layer_of(weight, scale, None)(x.cuda())
    x[3, 7], x[9, 0] = torch.nan, torch.inf
    got = layer_of(weight, scale, None)(x.cuda())
    poisoned = torch.zeros(40, dtype=torch.bool, device="cuda")
    poisoned[[3, 9]] = True
    assert got[poisoned].isnan().all()
    assert torch.equal(got[~poisoned], clean[~poisoned])


def test_a_compiled_layer_computes_the_same() -> None:
    x, matrix, bias = operands(300, 192, 768)
    weight, scale = quantize(matrix)
    layer = layer_of(weight.cuda(), scale.cuda(), bias.cuda())
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for count in (300, 17):
        torch.testing.assert_close(compiled(x[:count].cuda()), layer(x[:count].cuda()), rtol=0.02, atol=0.5)


def test_the_demo_model_draws_nearly_what_bfloat16_draws() -> None:
    params = [OmniDiffusionSamplingParams(num_inference_steps=20, seed=seed) for seed in range(4)]
    prompts = ["a red apple", "a panda on a pink background", "a lemon", "a rocket above a full moon"]
    drawn = []
    choices: list[dict[str, Any]] = [{}, {"quantization": "fp8"}]
    for settings in choices:
        with Omni(model=str(DEMO_MODEL_PATH), dtype="bfloat16", progress_bar=False, **settings) as omni:
            drawn.append([np.asarray(output.images[0]) for output in omni.generate(prompts, params)])
    found = [psnr(a, b) for a, b in zip(*drawn, strict=True)]
    print(f"fp8 to bfloat16: {found}")
    assert min(found) > 15
    assert np.mean(found) > 25


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="--quantization fp8 takes --dtype bfloat16 on a GPU, got float32"):
        Omni(model=str(DEMO_MODEL_PATH), dtype="float32", quantization="fp8", progress_bar=False)
