"""CUDA graphs of steps draw what the same steps draw sent kernel by kernel."""

from __future__ import annotations

import gc
import logging
from functools import partial
from pathlib import Path

import pytest
import torch

from testbed.runner_driver import Drive, psnr
from tests.diffusion.compute.families.test_cuda_graphs import ARRIVALS, BUILDERS
from tests.gpu.captures import Replays, dtype_for, model_of
from tests.gpu.marks import COMPILES, NEEDS_GPU
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig

pytestmark = [NEEDS_GPU, COMPILES]


@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("family", [*BUILDERS, "demo"])
def test_cuda_graphs_steps_draw_the_same(
    tmp_path: Path,
    family: str,
    quantization: str | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = model_of(family, tmp_path / "model", quantization)
    replays = Replays.counted(monkeypatch)
    draw = partial(replays.draw, path, ARRIVALS, dtype=dtype_for(quantization), quantization=quantization)
    eager = draw(enforce_eager=True)
    assert replays.num == 0
    recorded = draw()
    assert replays.num == 7
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    found = [psnr(recorded.images[i], picture) for i, picture in eager.images.items()]
    print(f"{family} {quantization}: {found}")
    assert min(found) >= (35 if quantization else 50)


def test_memory_of_recordings_is_given_back(tmp_path: Path) -> None:
    path = BUILDERS["qwen_image"](tmp_path / "model")
    runner = ModelRunner(OmniDiffusionConfig(model=str(path), dtype="float32"), load_model_info(str(path)))
    runner.start()
    first = Drive(runner).run(ARRIVALS)
    before = torch.cuda.memory_reserved()
    runner._release_memory(RuntimeError())
    assert torch.cuda.memory_reserved() < before
    again = Drive(runner).run(ARRIVALS)
    assert again.errors == {}
    assert min(psnr(again.images[i], picture) for i, picture in first.images.items()) >= 50


def test_garbage_is_not_collected_during_a_capture() -> None:
    """Destroying a CUDA graph while another one is captured makes the capture fail."""
    capturer = Device("cuda").capturer()
    assert capturer is not None

    def leave_garbage() -> None:
        _, play = capturer.capture(lambda: torch.ones(8, device="cuda"))
        play()
        torch.cuda.synchronize()
        cycle: list[object] = [play]
        cycle.append(cycle)

    def run() -> torch.Tensor:
        output = torch.ones(8, device="cuda")
        kept: list[list[None]] = [[] for _ in range(10_000)]  # more objects than start a collection
        assert kept
        return output + 1

    before = gc.get_threshold()
    gc.collect()
    try:
        gc.set_threshold(10_000, 10, 10)
        leave_garbage()
        gc.set_threshold(100, 1, 1)
        output, play = capturer.capture(run)
    finally:
        gc.set_threshold(*before)
    play()
    assert output.tolist() == [2.0] * 8
