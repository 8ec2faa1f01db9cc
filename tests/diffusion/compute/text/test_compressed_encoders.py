"""`--text-encoder-quantization`: states of prompts near those of the whole weights, in half of the memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from testbed.live_bytes import LiveBytes
from testbed.runner_driver import Drive, make_request, psnr
from testbed.tiny_models import build_tiny_qwen_image, photo
from testbed.tiny_wan import build_tiny_wan
from testbed.tiny_z_image import build_tiny_z_image
from tests.diffusion.compute.distributed.ranks import run_ranks
from tests.diffusion.compute.worker.replica import started
from vllm_omni.diffusion.catalog.find_folder import DEMO_MODEL_PATH
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.distributed.mesh import World
from vllm_omni.diffusion.compute.families.qwen_image.text import QwenImageTextEncoder
from vllm_omni.diffusion.compute.families.wan.text import WanTextEncoder
from vllm_omni.diffusion.compute.families.z_image.text import ZImageTextEncoder
from vllm_omni.diffusion.compute.layers.rounding import FLOAT8
from vllm_omni.diffusion.compute.weights.reader import WeightReader
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.worker import RankInfo
from vllm_omni.inputs.images import prepare_image

CPU = torch.device("cpu")
PROMPT = "a photo of a red apple and a blue car"
BUILDERS: dict[str, Callable[[Path], Path]] = {
    "qwen_image": lambda path: build_tiny_qwen_image(path, heads=2, text_kv_heads=2),
    "z_image": lambda path: build_tiny_z_image(path, heads=2, text_kv_heads=2),
    "wan": build_tiny_wan,
    "demo": lambda path: Path(DEMO_MODEL_PATH),
}


@pytest.fixture(scope="module", params=BUILDERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, BUILDERS[request.param](tmp_path_factory.mktemp("models") / request.param)


@torch.inference_mode()
def states(model: tuple[str, Path], reader: WeightReader, group: Group | None = None) -> Tensor:
    """States [tokens, width] of the prompt."""
    (family, path), ranks = model, group or Group.alone()
    if family == "wan":
        return WanTextEncoder(path, reader, ranks)(PROMPT, 512)
    if family == "z_image":
        return ZImageTextEncoder(path, reader, ranks)(PROMPT)
    return QwenImageTextEncoder(path, reader, ranks)(PROMPT)


def held(reader: WeightReader) -> int:
    return sum(x.nbytes for module in reader.modules for x in (*module.parameters(), *module.buffers()))


def nearness(got: Tensor, want: Tensor) -> float:
    """PSNR in dB: the largest magnitude to the mean error."""
    error = (got.float() - want.float()).square().mean()
    return float(10 * torch.log10(want.float().abs().max() ** 2 / error))


@pytest.mark.parametrize(("dtype", "least"), [(torch.int8, 40.0), (FLOAT8, 24.0)])
def test_states_are_near_those_of_the_whole_weights(model: tuple[str, Path], dtype: torch.dtype, least: float) -> None:
    """Small random models amplify rounding: bfloat16 alone is at 46 dB. The demo model is trained, and at 63 dB."""
    whole, rounded = WeightReader(CPU, torch.float32), WeightReader(CPU, torch.float32, row_dtype=dtype)
    found = nearness(states(model, rounded), states(model, whole))
    assert least < found < 70
    if model[0] == "demo":
        assert found > least + 20
    assert held(rounded) < 0.33 * held(whole)


def test_weights_are_rounded_one_by_one_as_they_are_read(model: tuple[str, Path]) -> None:
    reader = WeightReader(CPU, torch.float32, row_dtype=torch.int8)
    with LiveBytes() as live:
        states(model, WeightReader(CPU, torch.float32, load_format="dummy", row_dtype=torch.int8))
    states(model, reader)
    # A dummy weight, its magnitudes and quotients, and the activations.
    largest = max(x.numel() * 4 for module in reader.modules for x in module.buffers() if x.dtype == torch.int8)
    assert held(reader) < live.peak < held(reader) + 4.5 * largest


@torch.inference_mode()
def states_on_rank(world: World, model: tuple[str, Path], dtype: torch.dtype) -> np.ndarray:
    array: np.ndarray = states(
        model, WeightReader(CPU, torch.float32, row_dtype=dtype), world.mesh.text_encoder
    ).numpy()
    return array


@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8])
def test_two_ranks_share_the_encoder(model: tuple[str, Path], dtype: torch.dtype) -> None:
    whole = states(model, WeightReader(CPU, torch.float32))
    parallel = DiffusionParallelConfig(ulysses_degree=2, text_encoder_tp_size=2)
    for got in run_ranks(states_on_rank, parallel, model, dtype):
        assert nearness(torch.from_numpy(got), whole) > (40 if dtype == torch.int8 else 24)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_edits_are_near_those_of_the_whole_weights(tiny_edit_model: Path, name: str) -> None:
    image_input = load_model_info(str(tiny_edit_model)).image_input
    assert image_input is not None
    request = make_request("a", images=(prepare_image(photo(64, 48, seed=0), image_input.sizes),))
    pictures = []
    choices: list[dict[str, Any]] = [{}, {"text_encoder_quantization": name}]
    for settings in choices:
        drive = Drive(started(RankInfo(), DiffusionParallelConfig(), tiny_edit_model, **settings)).run({0: [request]})
        assert not drive.errors
        pictures.append(drive.images["a"])
    assert 25 < psnr(pictures[0], pictures[1]) < 80
