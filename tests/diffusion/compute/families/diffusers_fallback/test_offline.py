"""Behind the engine: several requests at once, aborts, refusals."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from testbed.runner_driver import psnr
from tests.diffusion.compute.families.diffusers_fallback.conftest import ModelOf
from vllm_omni import AsyncOmni
from vllm_omni.errors import InvalidRequestError, RequestAbortedError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.jobs import OutputStream
from vllm_omni.outputs import OmniRequestOutput

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
MODEL = "StableDiffusionXLPipeline"
PROMPT = "a red apple"


async def finish(omni: AsyncOmni, **params: Any) -> OmniRequestOutput:
    sampling = OmniDiffusionSamplingParams(output_type="np", **params)
    outputs = [output async for output in omni.generate(PROMPT, sampling)]
    return outputs[-1]


async def exhaust(stream: OutputStream) -> None:
    async for _ in stream:
        pass


def test_requests_at_once_and_an_abort(model_of: ModelOf) -> None:
    async def run() -> list[OmniRequestOutput]:
        omni = AsyncOmni(model=str(model_of(MODEL)), distributed_executor_backend="uni")
        await omni.start()
        stream = omni.generate(PROMPT, OmniDiffusionSamplingParams(num_inference_steps=200), "long")
        assert [(await anext(stream)).step for _ in range(2)] == [0, 1]
        pair = asyncio.gather(finish(omni, seed=1), finish(omni, seed=2, num_inference_steps=6, height=96))
        outputs = [*await pair]  # the long one has not kept them
        omni.abort("long")
        with pytest.raises(RequestAbortedError):
            await exhaust(stream)
        outputs.append(await finish(omni, seed=3))
        assert omni.status().num_running == 0
        await omni.close()
        return outputs

    outputs = asyncio.run(run())
    pipeline = DiffusionPipeline.from_pretrained(model_of(MODEL), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for output, (seed, steps, height) in zip(outputs, [(1, 4, 64), (2, 6, 96), (3, 4, 64)], strict=True):
        generator = torch.Generator("cpu").manual_seed(seed)
        expected = pipeline(PROMPT, height=height, width=64, num_inference_steps=steps, generator=generator).images[0]
        assert psnr(output.images[0], np.array(expected)) >= 60
        assert output.timings["text_encode"] > 0
        assert output.timings["denoise"] > 0
        assert output.timings["vae_decode"] > 0


def test_what_the_model_does_not_take_is_refused(model_of: ModelOf) -> None:
    async def run() -> None:
        omni = AsyncOmni(model=str(model_of(MODEL)), distributed_executor_backend="uni")
        await omni.start()
        with pytest.raises(InvalidRequestError, match="at most 77 are accepted") as caught:
            omni.generate("apple " * 100)
        assert caught.value.param == "prompt"
        with pytest.raises(InvalidRequestError, match="nearest valid size is 72x64") as caught:
            omni.generate(PROMPT, OmniDiffusionSamplingParams(width=70))
        assert caught.value.param == "width"
        await omni.close()

    asyncio.run(run())
