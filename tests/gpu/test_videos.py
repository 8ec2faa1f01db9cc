"""Wan on a GPU: the frames of the CPU path, which other tests compare with diffusers, and rounding in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from testbed.runner_driver import QUICK, Drive, fitted, make_request, psnr
from testbed.tiny_models import photo
from testbed.tiny_wan import KINDS, build_tiny_wan
from tests.gpu.marks import COMPILES, NEEDS_GPU
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.inputs.images import prepare_image

pytestmark = [NEEDS_GPU, COMPILES]


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the rounding of TF32 would hide other differences


def arrivals(path: Path, kind: str) -> dict[int, list[DiffusionRequest]]:
    info = load_model_info(str(path))
    image_input = info.image_input
    photos = [photo(80, 60, 1), photo(50, 70, 2)][: max(1, KINDS[kind].sees_image)]
    images = () if image_input is None else tuple(prepare_image(picture, image_input.sizes) for picture in photos)
    common: dict[str, Any] = {"height": 64, "images": images}
    joining: dict[int, list[DiffusionRequest]] = {
        0: [
            make_request("guided", negative_prompt="a blue car", num_frames=9, num_inference_steps=8, **common),
            make_request("long", num_frames=13, width=96, num_inference_steps=6, seed=1, **common),
        ],
        2: [make_request("short", num_frames=5, width=32, num_inference_steps=5, seed=2, **common)],
    }
    return {step: [fitted(request, info) for request in requests] for step, requests in joining.items()}


def draw(path: Path, requests: dict[int, list[DiffusionRequest]], **settings: Any) -> dict[str, np.ndarray]:
    runner = ModelRunner(OmniDiffusionConfig(model=str(path), **settings), load_model_info(str(path)), options=QUICK)
    runner.start()
    drive = Drive(runner).run(requests)
    assert not drive.errors
    return drive.images


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_draws_the_frames_of_the_cpu_path(tmp_path: Path, kind: str) -> None:
    path = build_tiny_wan(tmp_path / "model", kind, default_sampling_params={"height": 64, "width": 64})
    requests = arrivals(path, kind)
    exact = draw(path, requests, device="cpu", dtype="float32")
    found = draw(path, requests, device="cuda", dtype="float32")
    print(kind, {i: round(psnr(found[i], exact[i]), 1) for i in exact})
    assert found.keys() == exact.keys()
    for request_id, frames in exact.items():
        assert found[request_id].shape == frames.shape
        assert psnr(found[request_id], frames) >= 55


@pytest.mark.parametrize("kind", ["t2v-2.1", "ti2v-5b"])
def test_bfloat16_rounds_and_keeps_the_video(tmp_path: Path, kind: str) -> None:
    path = build_tiny_wan(tmp_path / "model", kind, default_sampling_params={"height": 64, "width": 64})
    requests = arrivals(path, kind)
    exact = draw(path, requests, device="cuda", dtype="float32")
    found = draw(path, requests, device="cuda", dtype="bfloat16")
    print(kind, {i: round(psnr(found[i], exact[i]), 1) for i in exact})
    assert min(psnr(found[i], exact[i]) for i in exact) >= 20
