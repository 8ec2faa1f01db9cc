"""The CPU does not wait for the device inside a step, as a fake GPU detects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from testbed.runner_driver import QUICK, Drive, fitted, make_request, psnr
from testbed.tiny_models import SMALL, photo
from testbed.tiny_wan import build_tiny_wan
from testbed.tiny_z_image import BASE_SHIFT, build_tiny_z_image
from tests.diffusion.compute.worker.scheduled_replica import Replica
from tests.fake_gpu import FAKE_GPU, FakeGpu, FakeGpuDevice, HostWaitsError
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.device.transfers import HOST, to_device
from vllm_omni.diffusion.compute.step.pipeline import RequestState
from vllm_omni.diffusion.compute.weights import loading
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import StepPlan
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.inputs.images import prepare_image

pytestmark = pytest.mark.usefixtures("module_on_one_thread")
StartOnGpu = Callable[[Path], ModelRunner]


@pytest.fixture(scope="module")
def gpu() -> FakeGpu:
    return FakeGpu()


@pytest.fixture(scope="module")
def on_gpu(gpu: FakeGpu, module_on_one_thread: None) -> StartOnGpu:
    """Start a model on the fake GPU, or give its runner again."""
    return cache(partial(started, gpu=gpu))


@pytest.fixture(scope="session")
def tiny_z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "z"
    return build_tiny_z_image(path, heads=5, shift=BASE_SHIFT, default_sampling_params=SMALL)


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_wan(tmp_path_factory.mktemp("models") / "wan", "t2v-a14b", default_sampling_params=SMALL)


@pytest.fixture(scope="session")
def tiny_animation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_wan(tmp_path_factory.mktemp("models") / "wan", "i2v-5b", default_sampling_params=SMALL)


def started(path: Path, gpu: FakeGpu | None = None) -> ModelRunner:
    config, info = OmniDiffusionConfig(model=str(path)), load_model_info(str(path))
    if gpu is None:
        runner = ModelRunner(config, info, options=QUICK)
        runner.start()
        return runner
    with patch("vllm_omni.diffusion.compute.worker.runner.Device", lambda *_: FakeGpuDevice()):
        runner = ModelRunner(config, info, options=QUICK)
    # Safetensors knows the devices that there are.
    loads = patch.object(loading, "safe_open", lambda file, **_: safe_open(file, framework="pt"))
    with loads, gpu, gpu.waiting_allowed():
        runner.start()
    return runner


def texts(path: Path) -> dict[int, list[DiffusionRequest]]:
    """Requests with and without guidance, in several sizes, that join and leave."""
    return {
        0: [make_request("guided", negative_prompt="", preview_steps=(2,))],
        2: [make_request("wide", height=48, width=80, num_inference_steps=3, cfg_normalization=1.0)],
        3: [make_request("both", negative_prompt="apple", cfg_truncation=0.5, cfg_normalization=1.0)],
    }


def edits(path: Path) -> dict[int, list[DiffusionRequest]]:
    edit = load_model_info(str(path)).image_input
    assert edit is not None
    one, two = (prepare_image(photo(*size, seed), edit.sizes) for seed, size in enumerate([(90, 60), (64, 64)]))
    return {
        0: [make_request("guided", negative_prompt="a blue car", images=(one,))],
        1: [make_request("two", height=48, width=80, images=(one, two), preview_steps=(1,))],
    }


def videos(path: Path) -> dict[int, list[DiffusionRequest]]:
    fields: dict[str, Any] = {"num_frames": 5, "max_sequence_length": 24, "num_inference_steps": 5}
    return {
        0: [make_request("guided", negative_prompt="", preview_steps=(2,), guidance_scale_2=2.0, **fields)],
        2: [make_request("wide", height=32, width=96, **(fields | {"num_frames": 9}))],
    }


def animations(path: Path) -> dict[int, list[DiffusionRequest]]:
    info = load_model_info(str(path))
    assert info.image_input is not None
    images = (prepare_image(photo(90, 60, 1), info.image_input.sizes),)
    return {
        i: [fitted(replace(request, images=images), info) for request in joining] for i, joining in videos(path).items()
    }


Arrivals = Callable[[Path], dict[int, list[DiffusionRequest]]]
CASES: list[tuple[str, Arrivals]] = [
    ("tiny_model", texts),
    ("tiny_edit_model", edits),
    ("tiny_z_image", texts),
    ("tiny_wan", videos),
    ("tiny_animation", animations),
]
IN_DEFAULT_RUN = ("tiny_model", "tiny_z_image")
MARKED_CASES = [pytest.param(*case, marks=() if case[0] in IN_DEFAULT_RUN else pytest.mark.thorough) for case in CASES]


@pytest.mark.parametrize(("model", "arrivals"), MARKED_CASES, ids=[name for name, _ in CASES])
def test_a_step_neither_reads_nor_copies(
    model: str, arrivals: Arrivals, gpu: FakeGpu, on_gpu: StartOnGpu, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(model)
    requests = arrivals(path)
    wanted = Drive(started(path)).run(requests)
    runner = on_gpu(path)
    before = gpu.num_operations
    with gpu:
        drive = Drive(runner).run(requests)
    assert not drive.errors, next(iter(drive.errors.values())).traceback
    assert gpu.num_operations - before > 1000
    for request_id, picture in wanted.images.items():
        assert psnr(picture, drive.images[request_id]) >= 60
    assert drive.previews.keys() == wanted.previews.keys()


@pytest.mark.thorough
@pytest.mark.parametrize(("model", "arrivals"), [("tiny_z_image", texts), ("tiny_animation", animations)])
def test_a_checkpoint_and_a_resume_read_nothing(
    model: str, arrivals: Arrivals, gpu: FakeGpu, on_gpu: StartOnGpu, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(model)
    whole = arrivals(path)[0][0]
    runner, parallel = on_gpu(path), DiffusionParallelConfig()
    with gpu:
        undisturbed = Replica(runner, parallel)
        undisturbed.add([whole], checkpoint_seconds=1e-9)
        (wanted,) = undisturbed.run().values()
        checkpoints = undisturbed.checkpoints[whole.request_id]
        resumed = Replica(runner, parallel)
        for checkpoint in checkpoints:
            resumed.add([replace(whole, request_id=f"at {checkpoint.step}")], resume=checkpoint)
        made = resumed.run()
    assert not resumed.errors
    assert len(made) == whole.num_inference_steps
    assert all(psnr(pixels, wanted) >= 60 for pixels in made.values())


@pytest.mark.parametrize(("model", "arrivals"), MARKED_CASES, ids=[name for name, _ in CASES])
def test_a_step_with_the_same_membership_uploads_nothing(
    model: str, arrivals: Arrivals, gpu: FakeGpu, on_gpu: StartOnGpu, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(model)
    runner = on_gpu(path)
    requests = [one for several in arrivals(path).values() for one in several]
    ids = [one.request_id for one in requests]
    with gpu:
        runner.execute(StepPlan(0, new_requests=requests, encode=ids))
        encoded = gpu.num_uploads
        runner.execute(StepPlan(1, denoise=ids))
        laid_out = gpu.num_uploads
        assert runner.execute(StepPlan(2, denoise=ids)).advanced == ids
        again = gpu.num_uploads
        runner.execute(StepPlan(3, release=ids))
    assert encoded < laid_out == again


def test_a_read_in_a_step_is_detected(
    tiny_model: Path, gpu: FakeGpu, on_gpu: StartOnGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = on_gpu(tiny_model)
    pipeline: Any = runner.pipeline
    combine: Callable[[RequestState, Sequence[Tensor]], Tensor] = pipeline.combine

    def reading(state: RequestState, branches: Sequence[Tensor]) -> Any:
        return combine(state, branches) * float(branches[0].norm() > 0)

    monkeypatch.setattr(pipeline, "combine", reading)
    with gpu:
        drive = Drive(runner).run({0: [make_request("a")]})
    assert "HostWaitsError: item reads from the device" in drive.errors["a"].traceback


@pytest.mark.parametrize("model", ["tiny_model", "tiny_z_image"])
def test_values_not_finite_are_found_without_waiting(
    model: str,
    gpu: FakeGpu,
    on_gpu: StartOnGpu,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    runner = on_gpu(request.getfixturevalue(model))
    pipeline: Any = runner.pipeline
    combine: Callable[[RequestState, Sequence[Tensor]], Tensor] = pipeline.combine

    def spoiling(state: RequestState, branches: Sequence[Tensor]) -> Any:
        return combine(state, branches) * (float("nan") if state.request.request_id == "bad" else 1.0)

    monkeypatch.setattr(pipeline, "combine", spoiling)
    previewed = make_request("bad", num_inference_steps=3, preview_steps=(2,))
    with gpu:
        drive = Drive(runner).run({0: [make_request("good"), previewed]})
        unseen = Drive(runner).run({0: [make_request("bad", num_inference_steps=2)]})
    assert (drive.errors["bad"].kind, set(drive.images)) == ("not_finite", {"good"})
    assert (unseen.errors["bad"].kind, unseen.images) == ("not_finite", {})


WAITS: list[Callable[[Tensor], object]] = [
    lambda x: x.sum().item(),
    lambda x: float(x.sum()),
    lambda x: bool((x > 0).all()),
    lambda x: (x > 0).nonzero(),
    lambda x: x[x > 0],
    lambda x: x.masked_select(x > 0),
    lambda x: x.to(HOST),
    lambda x: x.cpu(),
    lambda x: torch.zeros(3).copy_(x),
    lambda x: torch.zeros(3).pin_memory().copy_(x),
    lambda x: torch.zeros(3).to(FAKE_GPU),
    lambda x: torch.zeros(3).to(FAKE_GPU, non_blocking=True),
    lambda x: torch.tensor([1, 2], device=FAKE_GPU),
    lambda x: x + torch.ones(3),
    lambda x: x[torch.tensor([0])],
    lambda x: torch.ones(3, dtype=torch.int64, device=FAKE_GPU).repeat_interleave(x.long()),
]
GOES_ON: list[Callable[[Tensor], object]] = [
    lambda x: to_device(torch.zeros(3), FAKE_GPU),
    lambda x: torch.zeros(3).pin_memory().copy_(x, non_blocking=True),
    lambda x: torch.empty(3, device=FAKE_GPU).add_(x),
    lambda x: x * torch.tensor(2.0),
    lambda x: x[:2].split(1),
    lambda x: torch.where(x > 0, x, 0),
]


@pytest.mark.parametrize("act", [*WAITS, *GOES_ON])
@torch.inference_mode()
def test_the_fake_gpu_detects_waits(gpu: FakeGpu, act: Callable[[Tensor], object]) -> None:
    with gpu:
        x = to_device(torch.ones(3), FAKE_GPU)
        if act in WAITS:
            with pytest.raises(HostWaitsError):
                act(x)
        else:
            act(x)
