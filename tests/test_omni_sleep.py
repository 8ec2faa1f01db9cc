"""Sleep of `Omni` and `AsyncOmni` with a real model: pictures, errors, and calls from the wrong place."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from testbed.patience import GUARD_SECONDS
from testbed.runner_driver import quick_executor
from vllm_omni import AsyncOmni, Omni
from vllm_omni.errors import InvalidRequestError, UnavailableError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")
PARAMS = OmniDiffusionSamplingParams(height=32, width=32, num_inference_steps=5, seed=1, output_type="np")


@pytest.fixture(autouse=True)
def quick_start() -> Iterator[None]:
    with patch("vllm_omni.omni.make_executor", quick_executor):
        yield


def picture(omni: Omni) -> np.ndarray:
    (output,) = omni.generate("a red apple", PARAMS)
    return np.asarray(output.images[0])


@pytest.mark.parametrize("level", [1, 2])
def test_omni_sleeps_and_wakes(tiny_model: Path, level: int) -> None:
    with Omni(str(tiny_model), distributed_executor_backend="uni", progress_bar=False) as omni:
        wanted = picture(omni)
        assert omni.sleep(level) == level
        assert omni.is_sleeping()
        with pytest.raises(UnavailableError, match="the engine is sleeping, and takes requests after wake_up"):
            picture(omni)
        omni.wake_up()
        assert not omni.is_sleeping()
        assert np.array_equal(picture(omni), wanted)
        with pytest.raises(InvalidRequestError, match="level takes 1 or 2, got 3"):
            omni.sleep(3)
        omni.sleep()
    with pytest.raises(UnavailableError, match="closed"):
        omni.sleep()


async def test_requests_are_replayed_after_a_sleep(tiny_model: Path) -> None:
    omni = AsyncOmni(str(tiny_model), distributed_executor_backend="uni")
    with pytest.raises(UnavailableError, match="starting"):
        await omni.sleep()
    async with asyncio.timeout(GUARD_SECONDS), omni:
        alone = [np.asarray(output.images[0]) async for output in omni.generate("x", PARAMS) if output.finished]
        stream = omni.generate("x", PARAMS)
        await anext(stream)  # it has begun
        assert await omni.sleep(2) == 2
        assert await omni.is_sleeping()
        await omni.wake_up()
        again = [np.asarray(output.images[0]) async for output in stream if output.finished]
        assert len(again) == 1
        assert np.array_equal(again[0], alone[0])
        with pytest.raises(UnavailableError, match="event loop"):
            await asyncio.to_thread(asyncio.run, omni.sleep())
