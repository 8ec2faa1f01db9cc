"""On a GPU: a step never makes the host wait, and what leaves the device is whole however late it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from testbed.runner_driver import Drive, make_request, psnr
from testbed.tiny_models import build_tiny_qwen_image, photo
from testbed.tiny_z_image import BASE_SHIFT, build_tiny_z_image
from tests.gpu.marks import COMPILES, NEEDS_GPU
from tests.waiting import no_waits
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.device.streams import StreamEvent
from vllm_omni.diffusion.compute.device.transfers import HOST, to_device
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.inputs.images import prepare_image

pytestmark = [NEEDS_GPU, COMPILES]
LONG_CYCLES = 2_000_000_000
"""GPU clock cycles of a kernel that only counts: about a second."""


@pytest.fixture(params=["qwen_image", "qwen_image_edit", "z_image"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "z_image":
        return build_tiny_z_image(tmp_path / "z", heads=5, shift=BASE_SHIFT)
    edit = "QwenImageEditPlusPipeline" if request.param.endswith("edit") else None
    return build_tiny_qwen_image(tmp_path / "q", edit=edit, zero_cond_t=edit is not None)


def requests_for(path: Path) -> list[DiffusionRequest]:
    edit = load_model_info(str(path)).image_input
    images = () if edit is None else (prepare_image(photo(90, 60, 1), edit.sizes),)
    return [
        make_request("guided", negative_prompt="", images=images, preview_steps=(2,), cfg_normalization=1.0),
        make_request("wide", height=48, width=80, images=images, seed=2),
        make_request("late", negative_prompt="apple", images=images, seed=3, cfg_truncation=0.5),
    ]


def started(path: Path, overlap_decode: bool = False) -> ModelRunner:
    config = OmniDiffusionConfig(model=str(path), dtype="float32", device="cuda", overlap_decode=overlap_decode)
    runner = ModelRunner(config, load_model_info(str(path)))
    runner.start()
    return runner


class Launching:
    """A runner whose launches may not wait."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def execute(self, plan: StepPlan) -> StepResult:
        with no_waits():
            wait = self._runner.launch(plan)
        return wait()


@pytest.mark.parametrize("overlap_decode", [False, True])
def test_no_step_waits(model: Path, overlap_decode: bool) -> None:
    requests = requests_for(model)
    arrivals = {0: requests[:1], 1: requests[1:2], 2: requests[2:]}
    wanted = Drive(started(model)).run(arrivals)
    drive = Drive(Launching(started(model, overlap_decode))).run(arrivals)  # type: ignore[arg-type]
    assert not drive.errors, next(iter(drive.errors.values())).traceback
    for request_id, picture in wanted.images.items():
        assert psnr(picture, drive.images[request_id]) >= 60
    assert drive.previews.keys() == wanted.previews.keys()


def test_a_read_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = started(build_tiny_qwen_image(tmp_path / "q"))
    pipeline: Any = runner.pipeline
    combine = pipeline.combine
    monkeypatch.setattr(pipeline, "combine", lambda s, b: combine(s, b) * float(b[0].norm() > 0))
    drive = Drive(Launching(runner)).run({0: [make_request("a")]})  # type: ignore[arg-type]
    assert "synchroniz" in drive.errors["a"].message


@pytest.mark.parametrize("overlap_decode", [False, True])
def test_plans_are_launched_before_the_last_one_is_done(tmp_path: Path, overlap_decode: bool) -> None:
    path = build_tiny_qwen_image(tmp_path / "q")
    a, b = make_request("a", num_inference_steps=2), make_request("b", num_inference_steps=2, seed=1)
    runner = started(path, overlap_decode)
    wanted = Drive(runner).run({0: [a], 1: [b]})  # which loads every kernel, too
    plans = [
        StepPlan(0, new_requests=[a], encode=["a"]),
        StepPlan(1, new_requests=[b], encode=["b"], denoise=["a"]),
        StepPlan(2, denoise=["a", "b"]),
        StepPlan(3, denoise=["b"], decode=["a"]),
        StepPlan(4, decode=["b"], release=["a"]),
        StepPlan(5, release=["b"]),
    ]
    torch.cuda._sleep(LONG_CYCLES)
    waits = [runner.launch(plan) for plan in plans]
    assert not torch.cuda.current_stream().query(), "all plans are launched while the first waits for the device"
    results = [wait() for wait in waits]
    for request_id, result in (("a", results[3]), ("b", results[4])):
        assert psnr(result.images[request_id], wanted.images[request_id]) >= 60
    assert all(result.denoise_seconds > 0 for result in results[1:4])


def test_a_download_waits_for_no_later_work() -> None:
    device = Device("cuda")
    x = to_device(torch.arange(12, dtype=torch.uint8).reshape(2, 2, 3), device.torch)
    wait = device.download({"x": x + 1})
    made = StreamEvent(device.torch)
    torch.cuda._sleep(LONG_CYCLES)
    made.wait()
    assert (wait()["x"] == np.arange(1, 13).reshape(2, 2, 3)).all()
    assert not torch.cuda.current_stream().query()


def test_work_beside_comes_after_what_it_reads() -> None:
    device = Device("cuda")
    beside = device.stream(separate=True)
    x = torch.zeros(1000, device=device.torch)
    torch.cuda._sleep(LONG_CYCLES)
    x.add_(1)
    with beside.after([x]):
        wait = device.download({"x": x * 2})
    del x
    torch.empty(1000, device=device.torch).fill_(9)  # must not get the memory that is still read
    assert (wait()["x"] == 2).all()


def test_what_is_sent_lies_on_the_device() -> None:
    device = Device("cuda")
    square = torch.arange(16).view(4, 4)
    for tensor in (square, square.T, square[:, 1:3], square[0].expand(3, 4), torch.empty((0, 3)), torch.tensor(2.0)):
        with no_waits():
            sent = to_device(tensor, device.torch)
        assert sent.device == device.torch
        assert torch.equal(sent.to(HOST), tensor)
