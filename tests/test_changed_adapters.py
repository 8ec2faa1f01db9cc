"""Files of adapters that are removed, replaced or overwritten while requests run, and then a worker dies."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from testbed.runner_driver import psnr
from tests.test_adapter_life import Life, living
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.errors import AdapterChangedError
from vllm_omni.inputs.data import LoRARequest
from vllm_omni.jobs import OutputStream

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 30


def num_open(folder: Path) -> int:
    """Number of the folder's files that this process has open."""
    links = [link.path for link in os.scandir("/proc/self/fd")]
    return sum(os.readlink(link).startswith(str(folder)) for link in links if os.path.islink(link))


async def begun(stream: OutputStream) -> OutputStream:
    """The stream, once its request has made a step."""
    async for output in stream:
        if output.step:
            return stream
    raise AssertionError("a request makes steps before it ends")


def end_worker(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the worker process; a worker in a thread fails at its next plan."""
    engine: Any = life.omni._engine
    if life.omni.config.distributed_executor_backend == "mp":
        os.kill(engine._executor.worker_pids[0], signal.SIGKILL)
        return
    launch = ModelRunner.launch

    def fail(runner: ModelRunner, plan: object) -> NoReturn:
        monkeypatch.setattr(ModelRunner, "launch", launch)
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(ModelRunner, "launch", fail)


@pytest.mark.parametrize("backend", ["uni", pytest.param("mp", marks=pytest.mark.thorough)])
async def test_a_worker_that_is_replaced_reads_the_files_that_were_accepted(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    async with living(tiny_model, tmp_path, distributed_executor_backend=backend) as life:

        async def draw(name: str, file: Path | None) -> np.ndarray:
            return await life.draw(life.submit([LoRARequest(name, file)], STEPS))

        files = {name: life.file(name) for name in "abcd"}
        wanted = {name: await draw(f"{name}, archived", life.archived(name)) for name in "abd"}
        await life.omni.load_lora(LoRARequest("d", files["d"]))
        streams = [life.submit([LoRARequest(name, files[name])], STEPS) for name in "abc"]
        await asyncio.gather(*map(begun, streams))
        files["a"].unlink()
        life.replace("b")
        shutil.copyfile(life.archived("a"), files["c"])  # into the same file
        files["d"].unlink()  # no request uses it now
        end_worker(life, monkeypatch)
        first, second, third = await asyncio.gather(*map(life.draw, streams), return_exceptions=True)
        assert isinstance(first, np.ndarray)
        assert isinstance(second, np.ndarray)
        assert psnr(first, wanted["a"]) >= 60
        assert psnr(second, wanted["b"]) >= 60
        assert isinstance(third, AdapterChangedError)
        assert str(third) == "the LoRA adapter 'c' has changed since it was named: send the request again"
        assert psnr(await draw("d", None), wanted["d"]) >= 60, "a served adapter survives the death, too"
        assert psnr(await draw("c", files["c"]), wanted["a"]) >= 60, "a new request takes the new file"

        assert num_open(tmp_path) > 0
        for name in "abd":
            await life.omni.unload_lora(name)
        life.resident.forget(lambda key: True)
        assert num_open(tmp_path) == 0
