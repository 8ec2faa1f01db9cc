"""The budget on a real GPU: the share bounds PyTorch, and a step takes as much memory as predicted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu.models import write_model

from testbed.runner_driver import make_request
from tests.gpu.marks import NEEDS_GPU
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.distributed.mesh import Mesh
from vllm_omni.diffusion.compute.families.component_loader import ComponentLoader
from vllm_omni.diffusion.compute.memory.planned_model import plan_packed
from vllm_omni.diffusion.compute.startup.model_start import pipeline_class
from vllm_omni.diffusion.data import OmniDiffusionConfig

pytestmark = NEEDS_GPU
GIB = 2**30


@pytest.fixture
def whole_gpu() -> Iterator[None]:
    """Give PyTorch all of the memory again."""
    yield
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_share_bounds_what_is_allocated(whole_gpu: None) -> None:
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    share = min(0.5, 0.5 * free / total)
    device = Device("cuda", memory_share=share)
    assert device.memory_budget() == pytest.approx(share * total, rel=1e-3)
    left = device.free_memory_bytes()
    assert 0 < left < device.memory_budget()
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(left + GIB, dtype=torch.uint8, device=device.torch)
    held = torch.empty(left - GIB, dtype=torch.uint8, device=device.torch)
    assert device.free_memory_bytes() <= GIB + 2**26
    del held


def write_shallow(name: str, path: Path) -> Path:
    """A model of the published widths with two blocks."""
    write_model(name, path, tiny=False)
    for file, section, keys in (
        ("transformer/config.json", None, ("num_layers", "n_layers")),
        ("text_encoder/config.json", "text_config", ("num_hidden_layers",)),
    ):
        values = json.loads((path / file).read_text())
        of_section = values if section is None else values.get(section, values)
        of_section |= dict.fromkeys([key for key in keys if key in of_section], 2)
        of_section.pop("layer_types", None)
        (path / file).write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("name", ["qwen-image", "z-image"])
@torch.inference_mode()
def test_a_step_takes_as_much_as_predicted(name: str, quantization: Any, tmp_path: Path, whole_gpu: None) -> None:
    if quantization == "fp8" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU that multiplies float8 with a scale a row")
    path = write_shallow(name, tmp_path)
    info = load_model_info(str(path), "dummy")
    assert isinstance(info, PackedModelInfo)
    config = OmniDiffusionConfig(str(path), load_format="dummy", quantization=quantization, kernels="triton")
    gpu = torch.device("cuda", 0)
    before = torch.cuda.memory_allocated()
    loader = ComponentLoader(config, info, gpu, torch.bfloat16, lambda count: None, Mesh.single())
    pipeline = pipeline_class(info.family).build(loader)  # type: ignore[attr-defined]
    planned = plan_packed(config, info, torch.bfloat16)
    assert torch.cuda.memory_allocated() - before == pytest.approx(planned.weight_bytes, rel=0.02)
    request = make_request("r", height=1024, width=1024, negative_prompt="blurry", num_inference_steps=2)
    state = pipeline.encode(request)
    for _ in range(2):  # libraries allocate workspaces, and Triton compiles
        pipeline.predict([state])
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pipeline.predict([state])
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - held
    predicted = info.step_activation_bytes(
        sum(state.sequence_lengths), 2, input_bytes=None if quantization is None else 1
    )
    print(f"{name} {quantization}: predicted {predicted / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    # Z-Image's blocks are compiled in a server, and make fewer tensors at once than here.
    assert measured == pytest.approx(predicted, rel=0.2)
