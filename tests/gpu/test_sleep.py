"""Sleep on a GPU: the device's memory falls below 1 GB, and pictures afterwards are the same."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from testbed.runner_driver import psnr
from tests.gpu.marks import COMPILES, NEEDS_GPU
from tests.gpu.test_offload import write_large_blocks
from vllm_omni import AsyncOmni
from vllm_omni.diffusion.catalog.find_folder import DEMO_MODEL_PATH
from vllm_omni.errors import UnavailableError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

pytestmark = [NEEDS_GPU, COMPILES]
MOST_BYTES = 10**9
SECONDS = 300.0
PARAMS = OmniDiffusionSamplingParams(height=256, width=256, num_inference_steps=6, seed=1, output_type="np")


def device_bytes(num_other: int) -> int:
    """Memory of the GPU in use, by all processes, beyond `num_other`."""
    free, total = torch.cuda.mem_get_info()
    return total - free - num_other


async def draw(omni: AsyncOmni) -> np.ndarray:
    async for output in omni.generate("a red apple", PARAMS):
        if output.finished:
            return np.asarray(output.images[0])
    raise AssertionError("a stream ends with its picture")


@pytest.mark.parametrize("settings", [{}, {"enforce_eager": True}])
def test_memory_falls_below_1_gb_and_pictures_stay(settings: dict[str, Any]) -> None:
    async def run() -> None:
        torch.cuda.init()
        num_other = device_bytes(0)
        async with asyncio.timeout(SECONDS), AsyncOmni(str(DEMO_MODEL_PATH), **settings) as omni:
            awake = device_bytes(num_other)
            await omni.sleep(1)
            pids = {child.pid for child in psutil.Process().children()}
            asleep = device_bytes(num_other)
            print(f"{settings}: {awake / 1e9:.2f} GB awake, {asleep / 1e9:.2f} GB asleep at level 1")
            assert asleep < MOST_BYTES
            await omni.wake_up()
            wanted = await draw(omni)  # also rows of modulation are computed again, in the batches of this request
            for level in (1, 2):
                assert np.array_equal(await draw(omni), wanted)
                stream = omni.generate("a red apple", PARAMS)
                await anext(stream)  # it has begun
                await omni.sleep(level)
                asleep = device_bytes(num_other)
                print(f"{asleep / 1e9:.2f} GB asleep at level {level}")
                assert asleep < MOST_BYTES
                assert ({child.pid for child in psutil.Process().children()} == pids) == (level == 1)
                with pytest.raises(UnavailableError, match="sleeping"):
                    omni.generate("x", PARAMS)
                await omni.wake_up()
                replayed = [np.asarray(output.images[0]) async for output in stream if output.finished]
                for got in (replayed[0], await draw(omni)):
                    # A new process may tune its kernels otherwise.
                    assert np.array_equal(got, wanted) if level == 1 else psnr(got, wanted) > 45

    asyncio.run(run())


def test_a_runner_in_this_process_gives_its_memory_back() -> None:
    async def run() -> None:
        torch.cuda.init()
        before = torch.cuda.memory_reserved()
        settings: dict[str, Any] = {"distributed_executor_backend": "uni"}
        async with asyncio.timeout(SECONDS), AsyncOmni(str(DEMO_MODEL_PATH), **settings) as omni:
            used = torch.cuda.memory_reserved() - before
            for level in (1, 2):
                await omni.sleep(level)
                left = torch.cuda.memory_reserved() - before
                print(f"{used / 1e6:.1f} MB awake, {left / 1e6:.1f} MB asleep at level {level}")
                assert left < 0.25 * used
                await omni.wake_up()
                await draw(omni)

    asyncio.run(run())


def test_a_card_without_room_leaves_the_server_asleep(tmp_path: Path) -> None:
    """With weights of gigabytes: the driver keeps a rest of the memory that only some processes get."""
    path = str(write_large_blocks(tmp_path))

    async def run() -> None:
        settings: dict[str, Any] = {"load_format": "dummy", "enforce_eager": True}
        async with asyncio.timeout(SECONDS), AsyncOmni(path, **settings) as omni:
            wanted = await draw(omni)
            await omni.sleep(1)
            free, _ = torch.cuda.mem_get_info()
            taken = []
            with contextlib.suppress(torch.OutOfMemoryError):
                while torch.cuda.mem_get_info()[0] > 2**30:
                    taken.append(torch.empty(2**29, dtype=torch.uint8, device="cuda"))
            with pytest.raises(UnavailableError, match="sleeps on: the weights take"):
                await omni.wake_up()
            taken.clear()
            torch.cuda.empty_cache()
            assert torch.cuda.mem_get_info()[0] > free // 2
            await omni.wake_up()
            assert np.array_equal(await draw(omni), wanted)

    asyncio.run(run())
