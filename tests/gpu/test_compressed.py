"""Compressed weights on a GPU: numbers as on the CPU, no waiting, captured steps, pictures of the expanded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from testbed.gguf_files import HALVES, KINDS, mixed_types, random_blocks, save_gguf
from testbed.runner_driver import Drive, make_request, psnr
from testbed.single_files import folder_weights, save
from testbed.tiny_models import build_tiny_qwen_image
from tests.gpu.marks import COMPILES, NEEDS_GPU
from tests.waiting import no_waits
from vllm_omni import Omni
from vllm_omni.diffusion.catalog.find_folder import DEMO_MODEL_PATH
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.layers.compressed import (
    CompressedColumnLinear,
    CompressedRows,
    GgufRows,
    ScaledRows,
    compress,
)
from vllm_omni.diffusion.compute.layers.gguf_blocks import expand_blocks
from vllm_omni.diffusion.compute.layers.linear import ColumnLinear
from vllm_omni.diffusion.compute.layers.rounding import FLOAT8
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

pytestmark = [NEEDS_GPU, COMPILES]


def gguf_rows(kind: str, rows: int, columns: int) -> GgufRows:
    part = GgufRows(KINDS[kind], rows, columns)
    blocks = random_blocks(kind, rows * columns // KINDS[kind].block_numbers, 0.01)
    part.blocks.copy_(torch.from_numpy(blocks).view(rows, -1))
    return part


def scaled_rows(dtype: torch.dtype, rows: int, columns: int) -> ScaledRows:
    part = ScaledRows(dtype, rows, columns)
    part.values, part.scales = part.rounding(torch.randn(rows, columns))
    return part


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", HALVES)
def test_blocks_are_expanded_as_on_the_cpu(kind: str, dtype: torch.dtype) -> None:
    blocks = torch.from_numpy(random_blocks(kind, 64 * 1024 // KINDS[kind].block_numbers)).view(64, -1)
    want, got = torch.empty(64, 1024, dtype=dtype), torch.empty(64, 1024, dtype=dtype, device="cuda")
    expand_blocks(KINDS[kind], blocks, want)
    expand_blocks(KINDS[kind], blocks.cuda(), got)
    assert torch.equal(got.cpu(), want)


@pytest.fixture(params=["gguf", "int8", "fp8"])
def layer(request: pytest.FixtureRequest) -> CompressedColumnLinear:
    """A fused layer in bfloat16 on the GPU, with parts of different types."""
    torch.manual_seed(0)
    parts: list[CompressedRows]
    if request.param == "gguf":
        parts = [gguf_rows(kind, 128, 512) for kind in ("Q4_K", "Q6_K", "Q8_0")]
    else:
        dtype = torch.int8 if request.param == "int8" else FLOAT8
        parts = [scaled_rows(dtype, 128, 512) for _ in range(3)]
    return compress(ColumnLinear(512, 384, Group.alone()).bfloat16(), parts).cuda().requires_grad_(False)


def expanded(layer: CompressedColumnLinear) -> Tensor:
    return layer.expanded(torch.empty(0, dtype=torch.bfloat16, device="cuda"))


def test_a_layer_is_used_without_waiting_and_can_be_captured(layer: CompressedColumnLinear) -> None:
    x = torch.randn(5, 512, dtype=torch.bfloat16, device="cuda")
    want = torch.nn.functional.linear(x, expanded(layer), layer.bias)
    layer(x)
    with no_waits():
        got = layer(x)
    torch.testing.assert_close(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(captured, layer(x))


@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8])
def test_rows_are_rounded_and_looked_up_as_on_the_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(300, 512)
    part, on_gpu = ScaledRows(dtype, 300, 512), ScaledRows(dtype, 300, 512).cuda()
    part.values, part.scales = part.rounding(matrix)
    on_gpu.values, on_gpu.scales = on_gpu.rounding(matrix.cuda())
    numbers = torch.tensor([[7, 0, 299]])
    got, want = on_gpu.select(numbers.cuda(), torch.float32).cpu(), part.select(numbers, torch.float32)
    # GPUs divide by a constant in another way: a number in the middle of two may be rounded to the other one.
    step = 1 / 127 if dtype == torch.int8 else 2.0**-3
    assert (got - want).abs().max() <= 1.01 * step * matrix.abs().max()
    assert (got - want).norm() < 1e-2 * want.norm()


def test_a_gguf_file_draws_the_pictures_of_its_expanded_weights(tmp_path: Path) -> None:
    """Small steps are captured as CUDA graphs."""
    path = build_tiny_qwen_image(tmp_path / "model", heads=16)

    def expand_on_cpu(kind: str, blocks: np.ndarray) -> Tensor:
        out = torch.empty(len(blocks), KINDS[kind].block_numbers)
        expand_blocks(KINDS[kind], torch.from_numpy(blocks), out)
        return out

    file = tmp_path / "x.gguf"
    weights = save_gguf(folder_weights(path), file, mixed_types, expand_on_cpu)
    requests = [
        make_request("a", negative_prompt="a blue car", height=64, width=64, num_inference_steps=6),
        make_request("b", height=32, width=64, seed=4, num_inference_steps=6),
    ]
    images = []
    for each in (file, save(weights, tmp_path / "expanded.safetensors")):
        config = OmniDiffusionConfig(model=str(path), dtype="float32", device="cuda", transformer_file=str(each))
        runner = ModelRunner(config, load_model_info(str(path)))
        runner.start()
        drive = Drive(runner).run({0: requests})
        assert not drive.errors, next(iter(drive.errors.values())).traceback
        images.append(drive.images)
    for name in ("a", "b"):
        assert psnr(images[0][name], images[1][name]) >= 60


def test_text_encoders_in_8_bits_draw_nearly_the_same() -> None:
    drawn = []
    choices: list[dict[str, Any]] = [{}, {"text_encoder_quantization": "int8"}, {"text_encoder_quantization": "fp8"}]
    params = OmniDiffusionSamplingParams(num_inference_steps=10, seed=3)
    for settings in choices:
        with Omni(model=str(DEMO_MODEL_PATH), dtype="bfloat16", progress_bar=False, **settings) as omni:
            drawn.append(np.asarray(omni.generate("a red apple", params)[0].images[0]))
    found = [psnr(drawn[0], other) for other in drawn[1:]]
    print(f"int8 and fp8 text encoder to bfloat16: {found}")
    assert min(found) > 20
