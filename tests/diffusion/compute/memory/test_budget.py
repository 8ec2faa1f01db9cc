"""Budget of a device's memory: weights of published sizes, what fits on which card, the refusal before loading."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu.models import write_model

from testbed.runner_driver import QUICK
from testbed.tiny_diffusers import build_tiny_diffusers
from testbed.tiny_models import build_tiny_qwen_image
from testbed.tiny_wan import build_tiny_wan
from testbed.tiny_z_image import build_tiny_z_image
from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.device.flat_weights import FlatWeights
from vllm_omni.diffusion.compute.distributed.mesh import Mesh
from vllm_omni.diffusion.compute.families.component_loader import ComponentLoader
from vllm_omni.diffusion.compute.memory.budget import DeviceLimits, MemoryBudget, Row, memory_budget
from vllm_omni.diffusion.compute.memory.planned_requests import PlannedRequest, largest_planned_request
from vllm_omni.diffusion.compute.memory.remedies import find_remedies
from vllm_omni.diffusion.compute.memory.report import refusal, remedy_table, table, verdict
from vllm_omni.diffusion.compute.startup import model_start
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.errors import ConfigError

GIB = 2**30
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def qwen_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs of Qwen/Qwen-Image in its published size, without weights."""
    return write_model("qwen-image", tmp_path_factory.mktemp("models") / "qwen-image", tiny=False)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen-Image of the published widths with few layers: its budget is made in a moment."""
    path = write_model("qwen-image", tmp_path_factory.mktemp("models") / "shallow", tiny=False)
    for file, section, key in (
        ("transformer/config.json", None, "num_layers"),
        ("text_encoder/config.json", "text_config", "num_hidden_layers"),
    ):
        values = json.loads((path / file).read_text())
        of_section = values if section is None else values[section]
        of_section[key] = 6
        of_section.pop("layer_types", None)
        (path / file).write_text(json.dumps(values))
    return path


def gpu(total: float, share: float = 0.92, **values: Any) -> DeviceLimits:
    """A GPU of so many GiB."""
    return DeviceLimits(int(total * GIB), int(share * total * GIB), **values)


def budget_of(path: Path, limits: DeviceLimits, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> MemoryBudget:
    config = OmniDiffusionConfig(model=str(path), **settings)
    return memory_budget(config, load_model_info(str(path), "dummy"), limits, dtype)


def row(budget: MemoryBudget, name: str) -> Row:
    return next(row for row in budget.rows if row.name == name)


def test_qwen_image_of_the_published_size(qwen_image: Path) -> None:
    budget = budget_of(qwen_image, gpu(141))
    sizes = budget.model.component_bytes
    assert sizes["transformer"] == pytest.approx(40.86e9, rel=0.002)
    assert sizes["text_encoder"] == pytest.approx(14.14e9, rel=0.002)
    assert sizes["vae"] < 0.3e9
    assert budget.fits
    assert budget.serves_largest
    assert verdict(budget) == "it fits"
    assert 55e9 < budget.weight_bytes < budget.needed_bytes < budget.largest_bytes < 75e9


def test_24_gib_need_offload(qwen_image: Path) -> None:
    assert not budget_of(qwen_image, gpu(24)).fits
    offloaded = budget_of(qwen_image, gpu(24), enable_layerwise_offload=True)
    assert offloaded.fits
    assert offloaded.needed_bytes < 24e9
    in_float8 = budget_of(qwen_image, gpu(16), enable_layerwise_offload=True, quantization="fp8")
    assert in_float8.fits
    assert in_float8.needed_bytes < offloaded.needed_bytes < 16e9
    moved = offloaded.model.host_bytes
    assert offloaded.weight_bytes == offloaded.model.weight_bytes - moved + offloaded.model.slot_bytes
    assert in_float8.model.host_bytes < 0.75 * moved


def test_float8_and_ranks_take_less(shallow: Path) -> None:
    plain = budget_of(shallow, gpu(80)).model
    in_float8 = budget_of(shallow, gpu(80), quantization="fp8").model
    # Two thirds of a block are rounded to half of their bytes.
    assert in_float8.component_bytes["transformer"] == pytest.approx(
        plain.component_bytes["transformer"] * 2 / 3, rel=0.02
    )
    parallel = DiffusionParallelConfig(tensor_parallel_size=2, text_encoder_tp_size=2)
    shared = budget_of(shallow, gpu(80), parallel=parallel).model
    for name in ("transformer", "text_encoder"):
        assert shared.component_bytes[name] == pytest.approx(plain.component_bytes[name] / 2, rel=0.02)
    assert shared.component_bytes["vae"] == plain.component_bytes["vae"]
    sequence = DiffusionParallelConfig(ulysses_degree=2)
    whole = budget_of(shallow, gpu(80), parallel=sequence)
    assert whole.model.component_bytes == plain.component_bytes
    alone = row(budget_of(shallow, gpu(80)), "step, largest request")
    ours = row(whole, "step, largest request")
    assert ours.num_bytes is not None
    assert ours.num_bytes == pytest.approx((alone.num_bytes or 0) / 2, rel=0.01)


@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize(
    "build",
    [
        build_tiny_qwen_image,
        lambda path: build_tiny_qwen_image(path, edit="QwenImageEditPlusPipeline"),
        build_tiny_z_image,
        build_tiny_wan,
    ],
    ids=["qwen_image", "edit", "z_image", "wan"],
)
def test_planned_bytes_are_those_of_the_loaded_weights(build: Any, quantization: Any, tmp_path: Path) -> None:
    path = build(tmp_path)
    info = load_model_info(str(path))
    assert isinstance(info, PackedModelInfo)
    config = OmniDiffusionConfig(model=str(path), quantization=quantization)
    planned = memory_budget(config, info, gpu(24), torch.float32).model
    loader = ComponentLoader(config, info, CPU, torch.float32, lambda count: None, Mesh.single())
    model_start.pipeline_class(info.family).build(loader)  # type: ignore[attr-defined]
    loaded = {name: FlatWeights(modules).num_bytes for name, modules in loader.components.items()}
    assert dict(planned.component_bytes) == loaded


def test_components_that_take_turns_need_the_largest_alone(shallow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedModelInfo, "check_settings", lambda self, config: None)
    together = budget_of(shallow, gpu(80))
    in_turns = budget_of(shallow, gpu(80), enable_cpu_offload=True)
    sizes = in_turns.model.component_bytes
    largest = max(sizes.values())
    assert in_turns.weight_bytes == largest
    assert together.needed_bytes - in_turns.needed_bytes == pytest.approx(sum(sizes.values()) - largest, rel=0.1)
    assert in_turns.peak_bytes < together.peak_bytes


def remedies_of(path: Path, limits: DeviceLimits, float8: bool = True, **settings: Any) -> Any:
    config = OmniDiffusionConfig(model=str(path), **settings)
    info: ModelInfo = load_model_info(str(path), "dummy")
    budget = memory_budget(config, info, limits, torch.bfloat16)
    assert not budget.fits
    return budget, find_remedies(config, info, budget, torch.bfloat16, float8)


@pytest.mark.thorough
def test_flags_that_help_are_named_with_memory_and_speed(shallow: Path) -> None:
    budget, remedies = remedies_of(shallow, gpu(8, device_count=8))
    flags = [remedy.flags for remedy in remedies]
    assert "--enable-layerwise-offload" in flags
    assert all(remedy.budget.fits for remedy in remedies)
    devices = [remedy.config.parallel.world_size for remedy in remedies]
    assert devices == sorted(devices)
    sizes = {remedy.config.parallel.tensor_parallel_size for remedy in remedies}
    assert len(sizes) == 2, "fewer ranks will do"
    by_flags = {remedy.flags: remedy for remedy in remedies}
    assert by_flags["--enable-layerwise-offload"].slowdown > 1.2
    line = refusal(budget, remedies)
    assert line.count("\n") == 0
    assert line.startswith(f"the model needs {budget.needed_bytes / GIB:.2f} GiB, the device has 8.00 GiB, of which ")
    assert "--gpu-memory-utilization gives 7.36 GiB; it fits with " in line
    for remedy in remedies:
        assert f"{remedy.flags} ({remedy.budget.needed_bytes / GIB:.2f} GiB, {remedy.speed})" in line
        assert remedy.flags in remedy_table(remedies)


def test_flags_are_offered_that_the_device_and_the_model_take(shallow: Path) -> None:
    _, remedies = remedies_of(shallow, gpu(8, device_count=1), float8=False)
    assert remedies
    assert not any("tensor" in remedy.flags or "--quantization" in remedy.flags.split() for remedy in remedies)
    _, none = remedies_of(shallow, gpu(1, device_count=1))
    assert none == []
    assert refusal(_, none).endswith("no flags make it fit")


def test_large_requests_that_do_not_fit_are_no_reason_to_refuse(shallow: Path) -> None:
    plain = budget_of(shallow, gpu(80))
    between = (plain.needed_bytes + plain.largest_bytes) / 2 / GIB
    budget = budget_of(shallow, gpu(between, 1.0))
    assert budget.fits
    assert not budget.serves_largest
    assert "the largest requests may not fit" in verdict(budget)
    bounded = budget_of(shallow, gpu(between, 1.0), max_pixels=512 * 512)
    assert bounded.serves_largest


def test_a_cpu_refuses_weights_alone(shallow: Path) -> None:
    weights = budget_of(shallow, gpu(80)).weight_bytes
    enough = DeviceLimits(weights, weights + 2**20, is_gpu=False)
    budget = budget_of(shallow, enough)
    assert budget.fits
    assert verdict(budget).startswith("memory may not suffice")
    assert not budget_of(shallow, replace(enough, is_gpu=True)).fits, "on a GPU activations count"
    assert not budget_of(shallow, DeviceLimits(weights, weights - 1, is_gpu=False)).fits


def test_the_table_has_what_is_configured(shallow: Path, tmp_path: Path) -> None:
    names = [each.name for each in budget_of(shallow, gpu(80)).rows]
    assert names[:3] == ["weights: text encoder", "weights: transformer", "weights: VAE"]
    assert "CUDA graphs" in names
    assert not {"step cache", "adapters"} & set(names)
    settings: Any = {"enforce_eager": True, "cache_backend": "cache_dit", "enable_lora_loading": True}
    budget = budget_of(shallow, gpu(80, others_bytes=12 * GIB), **settings)
    left = budget.limits.given_bytes - budget.needed_bytes
    assert row(budget, "step cache").num_bytes == int(0.25 * left)
    assert row(budget, "adapters").num_bytes == int(0.05 * left)
    assert "CUDA graphs" not in [each.name for each in budget.rows]
    text = table(budget)
    assert "12.00 GiB of 80.00 GiB are used by other processes" in text
    adapter = tmp_path / "big.safetensors"
    adapter.write_bytes(bytes(1000))
    slots = budget_of(shallow, gpu(80), lora_modules={"a": str(adapter)}, max_loras=1)
    assert row(slots, "adapters").num_bytes == 1000


def test_tokens_of_a_rank() -> None:
    request = PlannedRequest(1024, 1024, 1, (5000, 4901), 512, 50)
    assert request.rank_tokens(DiffusionParallelConfig()) == 9901
    assert request.rank_tokens(DiffusionParallelConfig(cfg_parallel_size=2)) == 5000
    assert request.rank_tokens(DiffusionParallelConfig(ulysses_degree=2)) == 2500 + 2451
    assert request.rank_tokens(DiffusionParallelConfig(ring_degree=2, ulysses_degree=2, tensor_parallel_size=2)) == 2476


def test_the_largest_request_has_the_limits_of_the_server(tiny_model: Path) -> None:
    info = load_model_info(str(tiny_model))
    assert isinstance(info, PackedModelInfo)
    config = OmniDiffusionConfig(model=str(tiny_model))
    limits = {None: (1024, 1024), 2**31: (1024, 1024), 512 * 512: (512, 512), 512 * 256: (352, 368)}
    for max_pixels, size in limits.items():
        request = largest_planned_request(replace(config, max_pixels=max_pixels), info)
        assert (request.height, request.width) == size
        assert len(request.branch_tokens) == 2


def test_a_whole_pipeline_has_the_weights_of_its_files(tmp_path: Path) -> None:
    path = build_tiny_diffusers("FluxPipeline", tmp_path)
    budget = budget_of(path, gpu(24), torch.float32)
    files = sum(file.stat().st_size for file in path.glob("*/*.safetensors"))
    assert 0.9 * files < budget.weight_bytes <= files
    assert row(budget, "activations").num_bytes is None
    assert budget.needed_bytes == budget.weight_bytes
    assert "?" in table(budget)


@pytest.mark.parametrize("is_enough", [True, False])
def test_a_model_that_cannot_fit_is_refused_before_a_weight_is_read(
    tiny_model: Path, is_enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def start_model(*_: Any, **__: Any) -> Any:
        reads.append(1)
        raise InterruptedError("it loads")

    monkeypatch.setattr("vllm_omni.diffusion.compute.worker.runner.start_model", start_model)
    monkeypatch.setattr(Device, "memory_budget", lambda self: 2**30 if is_enough else 2**10)
    config = OmniDiffusionConfig(str(tiny_model), device="cpu")
    runner = ModelRunner(config, load_model_info(str(tiny_model)), options=QUICK)
    message = "it loads" if is_enough else "the model needs"
    with pytest.raises(InterruptedError if is_enough else ConfigError, match=message):
        runner.start()
    assert len(reads) == is_enough
