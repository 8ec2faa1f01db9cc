"""Previews, cancels and replays as a client sees them, with a tiny real model of every family."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import psutil
import pytest
from benchmarks.served import workers_among

from testbed.patience import GUARD_SECONDS
from testbed.runner_driver import quick_executor
from testbed.tiny_diffusers import build_tiny_diffusers
from testbed.tiny_models import build_tiny_qwen_image, photo
from testbed.tiny_wan import build_tiny_wan
from testbed.tiny_z_image import build_tiny_z_image
from vllm_omni import AsyncOmni
from vllm_omni.diffusion.control.events import EngineObserver
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.outputs import OmniRequestOutput

PARAMS = OmniDiffusionSamplingParams(height=64, width=64, num_inference_steps=40, seed=3)
DEFAULTS: dict[str, object] = {"height": 64, "width": 64}


@dataclass(frozen=True)
class Family:
    build: Callable[[Path], Path]
    prompt: dict[str, Any]


FAMILIES = {
    "qwen_image": Family(
        lambda path: build_tiny_qwen_image(path, default_sampling_params=DEFAULTS), {"prompt": "a red apple"}
    ),
    "edits": Family(
        lambda path: build_tiny_qwen_image(
            path, edit="QwenImageEditPlusPipeline", zero_cond_t=True, default_sampling_params=DEFAULTS
        ),
        {"prompt": "make it blue", "multi_modal_data": {"image": [photo(31, 70, 3), photo(90, 60, 1)]}},
    ),
    "z_image": Family(
        lambda path: build_tiny_z_image(path, default_sampling_params=DEFAULTS), {"prompt": "a red apple"}
    ),
    "wan": Family(
        lambda path: build_tiny_wan(path, "t2v-a14b", default_sampling_params=DEFAULTS | {"num_frames": 5}),
        {"prompt": "a red apple"},
    ),
    "by_diffusers": Family(
        lambda path: build_tiny_diffusers("StableDiffusion3Pipeline", path), {"prompt": "a red apple"}
    ),
}
WITH_PREVIEWS = ("qwen_image", "edits", "z_image", "wan")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module", params=WITH_PREVIEWS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    chosen = FAMILIES[request.param]
    return chosen.build(tmp_path_factory.mktemp("models") / request.param), chosen.prompt


@asynccontextmanager
async def started(
    path: Path, backend: Literal["mp", "uni"], observer: EngineObserver | None = None
) -> AsyncIterator[AsyncOmni]:
    with patch("vllm_omni.omni.make_executor", quick_executor):
        omni = AsyncOmni(model=str(path), distributed_executor_backend=backend, observer=observer)
    try:
        async with asyncio.timeout(GUARD_SECONDS):
            await omni.start()
            yield omni
    finally:
        await omni.close()


def worker() -> int:
    """Process id of the only worker."""
    (process,) = workers_among(psutil.Process().children())
    return int(process.pid)


def picture(output: OmniRequestOutput) -> np.ndarray:
    return np.asarray(output.images[0])


async def test_previews_come_in_time_and_who_leaves_disturbs_nobody(family: tuple[Path, dict[str, Any]]) -> None:
    path, prompt = family
    async with started(path, "uni") as omni:
        watched = replace(PARAMS, num_previews=2)
        outputs = [output async for output in omni.generate(prompt, watched)]
        assert outputs[-1].finished
        # A video's decode reports its frames after the last step.
        steps = list(dict.fromkeys(output.step for output in outputs if not output.images))
        assert steps == list(range(41))
        previews = [output for output in outputs if output.images and output.step < 40]
        assert len(previews) == 2
        errors = [float(np.abs(picture(p).astype(float) - picture(outputs[-1])).mean()) for p in previews]
        assert errors[0] > errors[1], "a later preview is nearer to the picture"

        leaving = omni.generate(prompt, PARAMS)
        stream = omni.generate(prompt, watched)
        async for output in leaving:
            if output.step >= 2:
                break
        await leaving.aclose()
        status = omni.status()
        assert status.num_running + status.num_waiting == 1
        company = [output async for output in stream][-1]
        assert np.abs(picture(company).astype(int) - picture(outputs[-1])).max() <= 1


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["edits", "z_image", "wan", "by_diffusers"], indirect=True)
async def test_a_replay_draws_the_same_picture(family: tuple[Path, dict[str, Any]]) -> None:
    path, prompt = family
    async with started(path, "mp") as omni:
        undisturbed = [output async for output in omni.generate(prompt, PARAMS)][-1]
        pid = worker()
        async for output in omni.generate(prompt, PARAMS):
            if output.step == 1 and worker() == pid:
                os.kill(pid, signal.SIGKILL)
        assert worker() != pid
        assert output.finished
        assert np.array_equal(picture(undisturbed), picture(output))


class Resumes(EngineObserver):
    """Notes the step of each request that a plan resumes, and the number of denoising steps that ran."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.num_run = 0

    def on_step(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        self.steps += [checkpoint.step for checkpoint in plan.resume.values()]
        self.num_run += len(result.advanced)


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["edits", "z_image", "wan"], indirect=True)
async def test_a_killed_worker_costs_the_steps_since_the_newest_checkpoint(family: tuple[Path, dict[str, Any]]) -> None:
    path, prompt = family
    resumes = Resumes()
    async with started(path, "mp", resumes) as omni:
        undisturbed = [output async for output in omni.generate(prompt, PARAMS)][-1]
        resumes.num_run, pid, saved, steps = 0, worker(), 0, [0]
        async for output in omni.generate(prompt, PARAMS, checkpoint_seconds=1e-9):
            steps.append(output.step)
            if output.checkpoint is not None and (saved := output.checkpoint.step) == 20 and worker() == pid:
                os.kill(pid, signal.SIGKILL)
        assert worker() != pid
        assert np.array_equal(picture(undisturbed), picture(output))
        assert steps == sorted(steps), "progress never falls"
        (resumed,) = resumes.steps
        assert 20 <= resumed <= saved
        assert 40 <= resumes.num_run <= 43, "at most the steps in flight were lost"
        assert output.timings["computed_steps"] == 40

        asked = omni.generate(prompt, PARAMS, "drained")
        async for output in asked:
            if output.step == 10 and not output.checkpointed:
                omni.request_checkpoint("drained")
            if output.checkpointed:
                break
        await asked.aclose()
        assert output.checkpoint is not None
        again = [output async for output in omni.generate(prompt, PARAMS, resume=output.checkpoint)]
        assert np.array_equal(picture(undisturbed), picture(again[-1]))
        assert again[0].step == output.checkpoint.step >= 10
        assert again[-1].timings["computed_steps"] == 40 - output.checkpoint.step
