"""`--load-format dummy`: folders without weights make pictures, the same on any layout."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel, ZImageTransformer2DModel
from torch import nn

from testbed.runner_driver import Drive, make_request, psnr
from testbed.tiny_models import build_tiny_qwen_image, photo
from testbed.tiny_z_image import build_tiny_z_image
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.worker.replica import merging, started
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.layers.linear import ColumnLinear, RowLinear
from vllm_omni.diffusion.compute.weights.loading import dummy_weight, load_weights, weight_targets
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.diffusion.messages.worker import RankInfo
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.images import prepare_image

CPU = torch.device("cpu")
DEFAULTS: dict[str, object] = {"height": 64, "width": 64}
BUILDERS: dict[str, Callable[[Path], Path]] = {
    "qwen_image": lambda path: build_tiny_qwen_image(path, heads=4, default_sampling_params=DEFAULTS),
    "edits": lambda path: build_tiny_qwen_image(
        path, edit="QwenImageEditPlusPipeline", heads=4, default_sampling_params=DEFAULTS
    ),
    "z_image": lambda path: build_tiny_z_image(path, heads=4, default_sampling_params=DEFAULTS),
}


@pytest.fixture(scope="module", params=BUILDERS)
def bare(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with configs and a tokenizer only."""
    folder = tmp_path_factory.mktemp("dummy")
    whole = BUILDERS[request.param](folder / "whole")
    path: Path = folder / request.param
    shutil.copytree(whole, path, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.rmtree(whole)
    return path


def guided(path: Path) -> DiffusionRequest:
    edit = load_model_info(str(path)).image_input
    images = () if edit is None else (prepare_image(photo(80, 60, 1), edit.sizes),)
    return make_request("a", negative_prompt="", num_inference_steps=50, images=images)


def draw(rank_info: RankInfo, parallel: DiffusionParallelConfig, path: Path) -> np.ndarray | None:
    """The picture, on the rank that decoded it."""
    runner = started(rank_info, parallel, path, load_format="dummy")
    drive = Drive(runner, merge=merging(runner)).run({0: [guided(path)]})
    assert not drive.errors
    return drive.images.get("a")


def test_values_stay_finite_and_runs_repeat(bare: Path) -> None:
    runner = started(RankInfo(), DiffusionParallelConfig(), bare, load_format="dummy")
    pipeline = runner.pipeline
    with torch.inference_mode():
        state = pipeline.encode(guided(bare))
        for _ in range(50):
            (branches,) = pipeline.predict([state])
            pipeline.advance(state, branches)
            state.settle()
        assert state.latents.isfinite().all()
        assert branches[0].std() > 0.01
        ((picture, *_),) = pipeline.decode([state.request], [state.latents])
    assert picture.float().std() > 0
    again = draw(RankInfo(), DiffusionParallelConfig(), bare)
    assert again is not None
    assert np.array_equal(picture, again)


def shares_of(rank: int, num_ranks: int) -> dict[str, torch.Tensor]:
    group = Group(range(num_ranks), rank, Counter())
    with torch.device("meta"):
        module = nn.ModuleDict({"column": ColumnLinear(6, 8, group), "row": RowLinear(8, 6, group)})
    load_weights(module, Path(), {}, CPU, torch.float32, load_format="dummy")
    return dict(module.named_parameters())


def test_the_shards_of_ranks_are_parts_of_the_same_weights() -> None:
    whole, parts = shares_of(0, 1), [shares_of(rank, 2) for rank in range(2)]
    for name, dim in (("column.weight", 0), ("column.bias", 0), ("row.weight", 1)):
        assert torch.equal(torch.cat([part[name] for part in parts], dim), whole[name])
    assert all(torch.equal(part["row.bias"], whole["row.bias"]) for part in parts)


@pytest.mark.thorough
def test_ranks_and_one_process_make_the_same_picture(bare: Path) -> None:
    parallel = DiffusionParallelConfig(tensor_parallel_size=2)
    one = draw(RankInfo(), DiffusionParallelConfig(), bare)
    assert one is not None
    for picture in run_places(draw, parallel, parallel, bare):
        assert psnr(picture, one) >= 50


def test_modules_of_diffusers_get_the_same_weights(bare: Path) -> None:
    """Benchmarks compare speed, and tests pictures, on equal weights."""
    runner = started(RankInfo(), DiffusionParallelConfig(), bare, load_format="dummy")
    ours: nn.Module = runner.pipeline.transformer  # type: ignore[attr-defined]
    family = load_model_info(str(bare)).family
    names = import_module(f"vllm_omni.diffusion.compute.families.{family}.transformer").CHECKPOINT_NAMES
    cls = ZImageTransformer2DModel if family == "z_image" else QwenImageTransformer2DModel
    folder = bare / "transformer"
    with torch.device("meta"):
        module = cls.from_config(cls.load_config(folder))
    load_weights(module, folder, {}, CPU, torch.float32, load_format="dummy")
    theirs = dict(module.named_parameters())
    targets = weight_targets(ours, names)
    assert set(targets) == set(theirs)
    assert all(torch.equal(target.tensor, theirs[name]) for name, target in targets.items())


def test_missing_weights_are_refused_without_the_dummy_format(bare: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \.safetensors file"):
        started(RankInfo(), DiffusionParallelConfig(), bare)


def test_a_weight_depends_on_its_name() -> None:
    kernel = dummy_weight("a.weight", (64, 32), torch.float32, CPU)
    assert torch.equal(kernel, dummy_weight("a.weight", (64, 32), torch.float32, CPU))
    assert not torch.equal(kernel, dummy_weight("b.weight", (64, 32), torch.float32, CPU))
    assert kernel.mean().abs() < 0.002
    assert 0.018 < kernel.std() < 0.022
    assert abs(dummy_weight("norm.weight", (1000,), torch.float32, CPU).mean() - 1) < 0.01
    assert dummy_weight("conv.gamma", (1000, 1, 1), torch.float32, CPU).mean() > 0.9
    assert dummy_weight("a.bias", (1000,), torch.float32, CPU).mean().abs() < 0.01
