"""A rank raises in the middle of a step while the other waits for it in NCCL: both are replaced, requests replay."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from benchmarks.served import workers_among

from testbed.runner_driver import psnr
from testbed.tiny_models import build_tiny_qwen_image
from tests.diffusion.control.executor.workers import ROOT
from tests.gpu.faults import ERRORS, fault_file, make_runner
from tests.gpu.test_pictures import PARAMS, PROMPTS
from vllm_omni import AsyncOmni
from vllm_omni.diffusion.compute.distributed.mesh import COLLECTIVE_TIMEOUT
from vllm_omni.diffusion.control.executor.multiproc import MultiprocExecutor
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

PATIENCE_SECONDS = 0.75 * COLLECTIVE_TIMEOUT.total_seconds()
"""For pictures with a restart among them: less than a rank waits in an exchange for one that does not come."""


def make_executor(config: OmniDiffusionConfig, *_: Any) -> MultiprocExecutor:
    return MultiprocExecutor(config, f"{make_runner.__module__}:{make_runner.__name__}")


@asynccontextmanager
async def started(path: Path) -> AsyncIterator[AsyncOmni]:
    """Eager: a rank's hook must run at every step."""
    parallel = DiffusionParallelConfig(ulysses_degree=2)
    omni = AsyncOmni(model=str(path), dtype="float32", enforce_eager=True, parallel_config=parallel)
    try:
        await omni.start()
        yield omni
    finally:
        await omni.close()


def workers() -> set[int]:
    """Process ids of both workers."""
    return {process.pid for process in workers_among(psutil.Process().children())}


async def draw(omni: AsyncOmni, number: int) -> list[np.ndarray]:
    """The first `number` requests, at the same time."""

    async def one(prompt: Any, params: Any) -> np.ndarray:
        *_, last = [output async for output in omni.generate(prompt, params)]
        return np.asarray(last.images[0])

    async with asyncio.timeout(PATIENCE_SECONDS):
        return await asyncio.gather(*(one(*request) for request in list(zip(PROMPTS, PARAMS))[:number]))


@pytest.mark.parametrize("kind", ERRORS)
async def test_the_other_rank_does_not_wait_and_requests_replay(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setattr("vllm_omni.omni.make_executor", make_executor)
    path = build_tiny_qwen_image(tmp_path / "model", heads=6, head_dim=32, text_kv_heads=2)
    async with started(path) as omni:
        wanted = await draw(omni, len(PROMPTS))
        for number in (len(PROMPTS), 1):  # a batch, and one that is alone
            before = workers()
            fault_file(path).write_text(kind)
            with_fault = await draw(omni, number)
            assert not fault_file(path).exists(), "the rank has failed"
            assert workers().isdisjoint(before)
            replaced, after = workers(), await draw(omni, len(PROMPTS))
            assert workers() == replaced
            for pictures in (with_fault, after):
                assert min(psnr(a, b) for a, b in zip(pictures, wanted)) >= 60
