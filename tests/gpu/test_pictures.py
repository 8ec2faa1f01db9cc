"""Whole engines on GPUs against diffusers on the same GPU, and many GPUs against one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline

from testbed.runner_driver import psnr
from testbed.tiny_models import build_tiny_qwen_image
from tests.gpu.marks import NEEDS_GPU
from vllm_omni import Omni
from vllm_omni.diffusion.catalog.find_folder import DEMO_MODEL_PATH
from vllm_omni.diffusion.compute.step.sampling import draw_noise, pack_latents
from vllm_omni.diffusion.data import DiffusionParallelConfig, DType
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

pytestmark = NEEDS_GPU
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

PROMPTS: list[Any] = [
    {"prompt": "a red apple", "negative_prompt": ""},
    "a panda on a pink background",
    {"prompt": "a rocket above a full moon", "negative_prompt": ""},
]
PARAMS = [
    OmniDiffusionSamplingParams(height=64, width=64, num_inference_steps=8, true_cfg_scale=3.0, seed=1),
    OmniDiffusionSamplingParams(height=96, width=64, num_inference_steps=5, true_cfg_scale=1.0, seed=2),
    OmniDiffusionSamplingParams(height=80, width=112, num_inference_steps=6, true_cfg_scale=3.0, seed=3),
]


def draw(path: Path, dtype: DType, **settings: Any) -> list[np.ndarray]:
    with Omni(model=str(path), dtype=dtype, progress_bar=False, **settings) as omni:
        return pictures(omni)


def pictures(omni: Omni) -> list[np.ndarray]:
    return [np.asarray(output.images[0]) for output in omni.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen_image(tmp_path_factory.mktemp("gpu") / "model", heads=6, head_dim=32, text_kv_heads=2)


@pytest.fixture(scope="module")
def one_gpu(tiny: Path) -> list[np.ndarray]:
    return draw(tiny, "float32")


def draw_with_diffusers(dtype: torch.dtype, noise_dtype: torch.dtype) -> list[np.ndarray]:
    pipeline = QwenImagePipeline.from_pretrained(DEMO_MODEL_PATH, dtype=dtype).to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    drawn = []
    for prompt, params in zip(PROMPTS, PARAMS):
        assert params.height
        assert params.width
        noise = draw_noise(
            (16, params.height // 8, params.width // 8), params.seed or 0, noise_dtype, torch.device("cpu")
        )
        pictures = pipeline(
            **(prompt if isinstance(prompt, dict) else {"prompt": prompt}),
            height=params.height,
            width=params.width,
            num_inference_steps=params.num_inference_steps,
            true_cfg_scale=params.true_cfg_scale,
            latents=pack_latents(noise)[None].to("cuda", dtype),
        ).images
        drawn.append(np.asarray(pictures[0]))
    return drawn


def test_a_mixed_batch_draws_what_diffusers_draws() -> None:
    exact = draw_with_diffusers(torch.float32, torch.float32)
    found = [psnr(a, b) for a, b in zip(draw(DEMO_MODEL_PATH, "float32"), exact)]
    print(f"float32: {found}")
    assert min(found) >= 60


def test_bfloat16_rounds_no_worse_than_diffusers() -> None:
    exact = draw_with_diffusers(torch.float32, torch.bfloat16)
    ours = [psnr(a, b) for a, b in zip(draw(DEMO_MODEL_PATH, "bfloat16"), exact)]
    theirs = [psnr(a, b) for a, b in zip(draw_with_diffusers(torch.bfloat16, torch.bfloat16), exact)]
    print(f"bfloat16: {ours}, diffusers {theirs}")
    assert min(ours) >= 25
    assert np.mean(ours) >= np.mean(theirs) - 3


@two_gpus
def test_a_copy_on_each_gpu_draws_what_one_draws(tiny: Path, one_gpu: Sequence[np.ndarray]) -> None:
    many = draw(tiny, "float32", parallel_config=DiffusionParallelConfig(data_parallel_size=2))
    assert min(psnr(a, b) for a, b in zip(many, one_gpu)) >= 60


@two_gpus
def test_a_killed_worker_is_replaced_and_its_requests_run_again(tiny: Path, one_gpu: Sequence[np.ndarray]) -> None:
    parallel = DiffusionParallelConfig(ulysses_degree=2)
    with Omni(model=str(tiny), dtype="float32", progress_bar=False, parallel_config=parallel) as omni:
        steps = OmniDiffusionSamplingParams(height=256, width=256, num_inference_steps=200, seed=1)
        long: list[Any] = []
        thread = threading.Thread(target=lambda: long.extend(omni.generate("a red apple", steps)))
        thread.start()
        os.kill(children()[-1], signal.SIGKILL)
        thread.join()
        assert len(long) == 1
        assert min(psnr(a, b) for a, b in zip(pictures(omni), one_gpu)) >= 60


def children() -> list[int]:
    tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
    return sorted(int(pid) for task in tasks for pid in (task / "children").read_text().split())
