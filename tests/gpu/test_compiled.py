"""On a GPU blocks run compiled or with fused kernels, and draw what they draw in plain PyTorch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testbed.runner_driver import Drive, make_request, psnr
from testbed.tiny_models import build_tiny_qwen_image
from testbed.tiny_z_image import build_tiny_z_image
from tests.gpu.marks import COMPILES, NEEDS_GPU
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig

pytestmark = [NEEDS_GPU, COMPILES]
ARRIVALS = {
    0: [make_request("a", negative_prompt="", seed=1)],
    1: [make_request("b", "a blue car", height=48, width=80, num_inference_steps=7, true_cfg_scale=1.0, seed=2)],
    3: [make_request("c", "apple " * 20, height=96, negative_prompt=" ", seed=3)],
}


@pytest.mark.parametrize("build", [build_tiny_qwen_image, build_tiny_z_image])
def test_compiled_before_the_first_request_or_fused(
    build: Callable[[Path], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = build(tmp_path / "model")

    def draw(**settings: Any) -> Drive:
        runner = ModelRunner(
            OmniDiffusionConfig(model=str(path), dtype="float32", **settings), load_model_info(str(path))
        )
        runner.start()
        return Drive(runner).run(ARRIVALS)

    compiled = draw(kernels="torch")
    assert "Block.before (" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    eager, fused = draw(kernels="torch", enforce_eager=True), draw(enforce_eager=True)
    assert "compiled" not in caplog.text
    for drive in (compiled, fused, draw()):
        assert drive.errors == eager.errors == {}
        assert min(psnr(drive.images[request_id], picture) for request_id, picture in eager.images.items()) >= 50
