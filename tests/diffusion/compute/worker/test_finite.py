"""Requests whose latents or pixels are not finite fail alone, with the cause if it is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from testbed.runner_driver import QUICK, Drive, kept, make_request, psnr
from testbed.tiny_models import SMALL, build_tiny_qwen_image
from testbed.tiny_z_image import build_tiny_z_image
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.worker.replica import merging, started
from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.step.finite import each_is_finite, is_finite
from vllm_omni.diffusion.compute.step.pipeline import RequestState
from vllm_omni.diffusion.compute.worker.item_errors import not_finite_error
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import ItemError, StepPlan
from vllm_omni.diffusion.messages.request import LoRA
from vllm_omni.diffusion.messages.worker import RankInfo

pytestmark = pytest.mark.usefixtures("one_thread")

UNKNOWN = ItemError("the model produced values that are not numbers (NaN or infinite)", "not_finite")
OVERFLOWED = ItemError("float16 overflowed: use bfloat16 (--dtype bfloat16)", "not_finite")
NAN, INFINITY = float("nan"), float("inf")
REQUESTS = [
    make_request("a", "a red apple", negative_prompt="", seed=1),
    make_request("b", "a blue car", height=48, width=80, seed=2),
    make_request("c", "a photo of a car", seed=3),
]


def start(path: Path, **settings: Any) -> ModelRunner:
    runner = ModelRunner(OmniDiffusionConfig(model=str(path), **settings), load_model_info(str(path)), options=QUICK)
    runner.start()
    return runner


@pytest.fixture(scope="module")
def runner(tiny_model: Path) -> ModelRunner:
    return start(tiny_model)


@pytest.fixture(scope="module")
def alone(runner: ModelRunner) -> dict[str, np.ndarray]:
    return {r.request_id: Drive(runner).run({0: [r]}).images[r.request_id] for r in REQUESTS}


def spoil(runner: ModelRunner, request_id: str, value: float, step: int) -> Callable[[], None]:
    """Put `value` into the latents of a request before one of its steps. Returns a call that ends this."""
    advance = runner.pipeline.advance

    def spoiling(state: RequestState, branches: Sequence[Tensor], previews: bool = False) -> Tensor | None:
        if state.request.request_id == request_id and state.step == step:
            state.latents = state.latents.clone()
            state.latents[-1, -1] = value
        return advance(state, branches, previews)

    runner.pipeline.advance = spoiling  # type: ignore[method-assign]
    return lambda: delattr(runner.pipeline, "advance")


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_latents_that_are_not_finite_fail_their_request_alone(
    runner: ModelRunner, alone: dict[str, np.ndarray], value: float
) -> None:
    undo = spoil(runner, "b", value, step=1)
    drive = Drive(runner).run({0: REQUESTS})
    undo()
    assert drive.errors == {"b": UNKNOWN}
    assert set(drive.images) == {"a", "c"}
    assert all(psnr(drive.images[i], alone[i]) >= 60 for i in ("a", "c"))
    assert kept(runner) == 0


def test_an_error_found_after_the_next_plan_began_ends_the_request(runner: ModelRunner) -> None:
    """On a GPU a result is read after later plans were launched."""
    undo = spoil(runner, "b", NAN, step=0)
    request = replace(REQUESTS[1], num_inference_steps=3, preview_steps=(1,))
    encoded = runner.launch(StepPlan(0, new_requests=[request], encode=["b"]))
    first = runner.launch(StepPlan(1, denoise=["b"], preview=["b"]))
    second = runner.launch(StepPlan(2, denoise=["b"]))
    assert encoded().errors == {}
    failed, next_one = first(), second()
    assert (failed.errors, failed.previews) == ({"b": UNKNOWN}, {})
    assert next_one.errors == {}
    runner.execute(StepPlan(3, release=["b"]))
    undo()
    assert kept(runner) == 0


def test_a_broken_request_ends_at_its_preview(runner: ModelRunner) -> None:
    undo = spoil(runner, "p", NAN, step=1)
    request = make_request("p", num_inference_steps=6, preview_steps=(1, 3, 5))
    drive = Drive(runner).run({0: [request]})
    undo()
    assert drive.errors == {"p": UNKNOWN}
    assert len(drive.previews["p"]) == 1
    assert len(drive.pack_sizes) < 1 + 6  # steps and the encode: not all were made


def test_a_preview_beyond_the_range_is_skipped(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request("p", num_inference_steps=4, preview_steps=(1, 3))
    wanted = Drive(runner).run({0: [request]})
    pipeline: Any = runner.pipeline
    original = pipeline.predict_clean
    monkeypatch.setattr(
        pipeline,
        "predict_clean",
        lambda state, velocity: original(state, velocity) * (INFINITY if state.step == 0 else 1),
    )
    drive = Drive(runner).run({0: [request]})
    assert not drive.errors
    assert np.array_equal(drive.images["p"], wanted.images["p"])
    assert len(drive.previews["p"]) == 1
    assert np.array_equal(drive.previews["p"][0], wanted.previews["p"][1])


Build = Callable[[Path], Path]
BUILDERS: dict[str, Build] = {
    "qwen_image": lambda path: build_tiny_qwen_image(path, default_sampling_params=SMALL),
    "z_image": lambda path: build_tiny_z_image(path, default_sampling_params=SMALL),
}


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("family", BUILDERS)
def test_pixels_that_are_not_finite_fail_the_request(tmp_path: Path, family: str, value: float, tiled: bool) -> None:
    """Infinite pixels too, which some VAEs clamp."""
    path = BUILDERS[family](tmp_path / "model")

    def spoil_bias(weights: dict[str, torch.Tensor]) -> None:
        weights["decoder.conv_out.bias"][0] = value

    change_weights(path / "vae", spoil_bias)
    request = make_request("a", height=144, width=144, num_inference_steps=1)
    drive = Drive(start(path, vae_use_tiling=tiled)).run({0: [request]})
    assert (drive.errors, drive.images) == ({"a": UNKNOWN}, {})


def test_an_overflow_of_float16_is_reported(tmp_path: Path) -> None:
    path = BUILDERS["z_image"](tmp_path / "model")

    def enlarge(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            if name.endswith("feed_forward.w2.weight"):
                weights[name] *= 1e5

    change_weights(path / "transformer", enlarge)
    request = make_request("a", num_inference_steps=2)
    assert Drive(start(path, dtype="float16")).run({0: [request]}).errors == {"a": OVERFLOWED}
    assert not Drive(start(path, dtype="bfloat16")).run({0: [request]}).errors


@pytest.mark.parametrize("scale", [1e30, 1e300])
def test_an_overflow_by_guidance_is_an_invalid_request(runner: ModelRunner, scale: float) -> None:
    """The first one overflows in the norm of the velocity alone."""
    request = make_request("a", negative_prompt="", true_cfg_scale=scale)
    expected = f"true_cfg_scale {scale:g} made values that are not numbers (NaN or infinite); up to 100 is usual"
    assert Drive(runner).run({0: [request]}).errors == {"a": ItemError(expected, "invalid", param="true_cfg_scale")}


@pytest.fixture(scope="module")
def turbo_info(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    return load_model_info(str(BUILDERS["z_image"](tmp_path_factory.mktemp("models") / "z")))


def test_the_error_names_the_callers_parameter(runner: ModelRunner, turbo_info: ModelInfo) -> None:
    guided = make_request("a", negative_prompt="", true_cfg_scale=1001.0)
    error = not_finite_error(guided, turbo_info, torch.float16)
    assert (error.kind, error.param) == ("invalid", "guidance_scale")
    assert error.message.startswith("guidance_scale 1000 made")
    unguided = replace(guided, true_cfg_scale=1.0)
    assert not_finite_error(unguided, turbo_info, torch.float16) == OVERFLOWED
    assert not_finite_error(replace(guided, true_cfg_scale=30.0), turbo_info, torch.bfloat16) == UNKNOWN
    scaled = replace(unguided, loras=(LoRA("ink", "/ink.safetensors", -50.0),))
    assert not_finite_error(scaled, turbo_info, torch.float32).param == "lora_scale"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_single_value_is_found_at_any_position(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7, 64, 1000, 5000):
        values = torch.randn((3, size), generator=generator).to(dtype)
        values[0, 0] = torch.finfo(dtype).max
        assert bool(is_finite(values))
        for bad in (NAN, INFINITY, -INFINITY):
            for position in {0, size // 2, size - 1}:
                spoiled = values.clone()
                spoiled[1, position] = bad
                assert not bool(is_finite(spoiled))
                assert each_is_finite(spoiled).tolist() == [True, False, True]
    assert bool(is_finite(values[:, :0]))


LAYOUTS = {
    "dealt": DiffusionParallelConfig(ulysses_degree=2),
    "shared": DiffusionParallelConfig(cfg_parallel_size=2, vae_patch_parallel_size=2),
}


def draw_spoiled(rank_info: RankInfo, parallel: DiffusionParallelConfig, path: Path) -> tuple[Any, Any, Any, int]:
    runner = started(rank_info, parallel, path)
    spoil(runner, "b", NAN, step=1)
    late = make_request("late", seed=4, num_inference_steps=5, preview_steps=(2, 4))
    undo_late = runner.pipeline.advance

    def spoiling(state: RequestState, branches: Sequence[Tensor], previews: bool = False) -> Tensor | None:
        if state.request.request_id == "late" and state.step == 2:
            state.latents = state.latents * NAN
        return undo_late(state, branches, previews)

    runner.pipeline.advance = spoiling  # type: ignore[method-assign]
    drive = Drive(runner, merge=merging(runner)).run({0: REQUESTS, 1: [late]})
    return drive.images, {i: len(p) for i, p in drive.previews.items()}, drive.errors, kept(runner)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_not_finite_on_one_rank_end_the_request_on_all(
    tiny_model: Path, alone: dict[str, np.ndarray], layout: str
) -> None:
    for images, previews, errors, num_kept in run_places(draw_spoiled, LAYOUTS[layout], LAYOUTS[layout], tiny_model):
        assert errors == {"b": UNKNOWN, "late": UNKNOWN}
        assert previews == {"late": 1}
        assert set(images) == {"a", "c"}
        assert all(psnr(images[i], alone[i]) >= 60 for i in ("a", "c"))
        assert num_kept == 0
