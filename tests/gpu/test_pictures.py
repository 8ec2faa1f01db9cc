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

from tests.diffusion.worker.driving import psnr
from tests.tiny_models import build_tiny_qwen_image
from vllm_omni import Omni
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.registry import DEMO_MODEL_PATH
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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


def draw(path: Path, dtype: str, **settings: Any) -> list[np.ndarray]:
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


@pytest.mark.parametrize(("dtype", "decibels"), [("float32", 60), ("bfloat16", 35)])
def test_a_mixed_batch_draws_what_diffusers_draws(dtype: str, decibels: float) -> None:
    pipeline = QwenImagePipeline.from_pretrained(DEMO_MODEL_PATH, dtype=getattr(torch, dtype)).to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    for prompt, params, ours in zip(PROMPTS, PARAMS, draw(DEMO_MODEL_PATH, dtype)):
        words = prompt if isinstance(prompt, dict) else {"prompt": prompt}
        theirs = pipeline(
            **words,
            height=params.height,
            width=params.width,
            num_inference_steps=params.num_inference_steps,
            true_cfg_scale=params.true_cfg_scale,
            generator=torch.Generator("cpu").manual_seed(params.seed or 0),
        ).images[0]
        decibels_found = psnr(ours, np.asarray(theirs))
        print(f"{dtype} {params.width}x{params.height}: {decibels_found:.1f} dB")
        assert decibels_found >= decibels


LAYOUTS = [
    {"ulysses_degree": 2},
    {"ring_degree": 2},
    {"cfg_parallel_size": 2},
    {"tensor_parallel_size": 2, "vae_patch_parallel_size": 2, "text_encoder_tp_size": 2},
    {"data_parallel_size": 2},
]


@two_gpus
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: next(iter(layout)))
def test_two_gpus_draw_what_one_draws(tiny: Path, one_gpu: Sequence[np.ndarray], layout: dict[str, int]) -> None:
    many = draw(tiny, "float32", parallel_config=DiffusionParallelConfig(**layout))
    found = [psnr(a, b) for a, b in zip(many, one_gpu)]
    print(f"{layout}: {min(found):.1f} dB")
    assert min(found) >= 60


@two_gpus
def test_two_gpus_in_bfloat16() -> None:
    one = draw(DEMO_MODEL_PATH, "bfloat16")
    two = draw(DEMO_MODEL_PATH, "bfloat16", parallel_config=DiffusionParallelConfig(ulysses_degree=2))
    found = [psnr(a, b) for a, b in zip(one, two)]
    print(f"ulysses 2 in bfloat16: {min(found):.1f} dB")
    assert min(found) >= 35


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
