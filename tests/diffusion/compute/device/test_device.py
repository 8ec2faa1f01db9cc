"""Properties of a worker's device, downloads from it, and the CPU threads beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from testbed.runner_driver import QUICK
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.device.streams import StreamEvent
from vllm_omni.diffusion.compute.device.timing import Stopwatch
from vllm_omni.diffusion.compute.startup import rank_timer
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig


def test_the_automatic_dtype_depends_on_the_device() -> None:
    cpu = Device("cpu")
    assert (cpu.dtype("auto"), cpu.dtype("float16")) == (torch.float32, torch.float16)


def test_on_a_cpu_streams_events_and_downloads_are_done_at_once() -> None:
    device = Device("cpu")
    x = torch.arange(12, dtype=torch.uint8).reshape(2, 2, 3)
    before = StreamEvent(device.torch)
    with device.stream(separate=True).after([x]):
        wait = device.download({"x": x + 1})
    after = StreamEvent(device.torch)
    assert (wait()["x"] == np.arange(1, 13).reshape(2, 2, 3)).all()
    after.wait()
    assert after.seconds_since(before) >= 0


def test_a_stopwatch_adds_up_by_stage() -> None:
    watch = Stopwatch(Device("cpu").torch)
    for stage in ("a", "b", "a"):
        with watch.measure(stage):
            torch.ones(10).sum()
    with pytest.raises(KeyError), watch.measure("b"):
        raise KeyError
    seconds = watch.seconds()
    assert set(seconds) == {"a", "b"}
    assert min(seconds.values()) > 0


@pytest.mark.parametrize(("is_asynchronous", "num_threads"), [(True, 1), (False, 2)])
def test_a_cpu_that_launches_kernels_uses_one_thread(
    tiny_model: Path, is_asynchronous: bool, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "is_asynchronous", is_asynchronous)
    monkeypatch.setattr(rank_timer, "choose_num_threads", lambda *_: None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        config = OmniDiffusionConfig(str(tiny_model), enforce_eager=True)
        ModelRunner(config, load_model_info(str(tiny_model)), options=QUICK).start()
        assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)


def test_a_call_is_timed_until_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Slow(Device):
        def synchronize(self) -> None:
            nonlocal now
            now += 10.0

    def run() -> None:
        nonlocal now
        now += 1.0

    monkeypatch.setattr("vllm_omni.diffusion.compute.device.device.time.perf_counter", lambda: now)
    assert Slow("cpu").elapsed(run) == 11.0


def test_a_cpu_has_the_available_memory_of_its_process() -> None:
    device = Device("cpu", memory_share=0.1)
    assert device.memory_budget() > 2**20, "the share is one of a GPU"
    assert device.others_memory_bytes == 0
    device._num_processes = 1000
    assert device.memory_budget() < Device("cpu").memory_budget() / 500
    assert device.free_memory_bytes() < Device("cpu").free_memory_bytes() / 500
