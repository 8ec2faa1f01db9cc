"""A restarted worker makes the same pixels as after its first start, although new measurements would differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from testbed.runner_driver import QUICK, Drive, make_request, psnr
from testbed.tiny_diffusers import build_tiny_diffusers
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.attention import BACKENDS, Setting, backend_class
from vllm_omni.diffusion.compute.attention.sdpa import SdpaAttention
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.packing import Offsets
from vllm_omni.diffusion.compute.startup import attention_choice, rank_timer
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.control.executor.inline import InlineExecutor
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import WorkerReady

REQUEST = make_request("r", negative_prompt="", seed=3)


class FromTheLeft(SdpaAttention):
    """A backend whose pictures differ visibly from those of `sdpa`."""

    @classmethod
    def why_not(cls, setting: Setting) -> str | None:
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets) -> Tensor:
        return super().attend(q, k, v.flip(1), offsets_q, offsets_k)


class Measurements:
    """Results of the measurements of one start."""

    fastest: Any = "cudnn"
    num_threads = 2
    free_bytes = 4000


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Measurements:
    """Measurements of the next start. The backend `cudnn` is a fake that runs here."""
    measured = Measurements()
    monkeypatch.setitem(BACKENDS, "cudnn", f"{__name__}:{FromTheLeft.__name__}")

    def measure(classes: dict[str, Any], *_: Any) -> tuple[dict[str, float], dict[str, str]]:
        fastest = backend_class(measured.fastest)
        return {name: 1.0 if issubclass(cls, fastest) else 2.0 for name, cls in classes.items()}, {}

    def choose_num_threads(device: Device, *_: Any) -> None:
        device.set_num_threads(measured.num_threads)

    monkeypatch.setattr(attention_choice, "measure", measure)
    monkeypatch.setattr(rank_timer, "choose_num_threads", choose_num_threads)
    monkeypatch.setattr(Device, "free_memory_bytes", lambda self: measured.free_bytes)
    return measured


class Lives:
    """The executor of one worker in this process, and the runner of its last start."""

    def __init__(self, path: Path) -> None:
        self.runner: ModelRunner
        self._config = OmniDiffusionConfig(model=str(path), device="cpu")
        self._executor = InlineExecutor(self._make)

    def _make(self) -> ModelRunner:
        self.runner = ModelRunner(self._config, load_model_info(str(self._config.model)), options=QUICK)
        return self.runner

    async def start(self) -> WorkerReady:
        ready = await self._executor.start()
        torch.set_num_threads(1)  # the next start begins with one thread
        return ready

    def picture(self) -> np.ndarray:
        return Drive(self.runner).run({0: [REQUEST]}).images["r"]


async def test_a_restart_keeps_measured_choices_and_pixels(tiny_model: Path, now: Measurements) -> None:
    lives = Lives(tiny_model)
    first = await lives.start()
    assert (first.attention_backend, first.num_threads, first.cache_bytes) == ("cudnn", 2, 1000)
    picture = lives.picture()
    now.fastest, now.num_threads, now.free_bytes = "sdpa", 3, 8000
    for _ in range(2):
        again = await lives.start()
        assert (again.attention_backend, again.num_threads, again.cache_bytes) == ("cudnn", 2, 1000)
        assert lives.runner.pipeline.step_cache.budget.max_bytes == 1000
        assert np.array_equal(lives.picture(), picture)
    other = Lives(tiny_model)
    assert (await other.start()).attention_backend == "sdpa"
    assert psnr(other.picture(), picture) < 50, "the kernels cannot be told apart"


async def test_a_whole_pipeline_keeps_its_threads(tmp_path: Path, now: Measurements) -> None:
    lives = Lives(build_tiny_diffusers("FluxPipeline", tmp_path))
    assert (await lives.start()).num_threads == 2
    now.num_threads = 3
    assert (await lives.start()).num_threads == 2
