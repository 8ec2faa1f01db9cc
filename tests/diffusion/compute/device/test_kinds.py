"""The choice of a device, what no other module may say of it, and what leaves it."""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import vllm_omni
from testbed.fakes import make_config
from testbed.live_server import FAKE_INFO
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.device.kinds import (
    CudaGraphCapturer,
    Device,
    Mark,
    Stopwatch,
    check_world_size,
    kind_of,
    no_garbage_collection,
)
from vllm_omni.diffusion.compute.startup import warmup
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.control.executor import make_executor
from vllm_omni.diffusion.data import DeviceChoice, DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.errors import ConfigError

PACKAGE = Path(vllm_omni.__file__).parent
MAY_NAME_DEVICES = {
    "diffusion/compute/device/kinds.py": "the one that knows kinds of device",
    "diffusion/control/compiled_packages.py": "builds of PyTorch and its companions are for a version of CUDA",
    "platforms.py": "a name of the public vllm-omni package, whose scripts ask it for the kind of device",
    "diffusion/compute/device/transfers.py": "the host's memory is PyTorch's `cpu`",
    "diffusion/data.py": "the values of --device",
    "diffusion/compute/attention": "kernels are of a kind of device",
}


def names_of_devices(source: str) -> Iterator[str]:
    """Literals of kinds of device, and uses of what is called `cuda`."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.split(":")[0] in ("cpu", "cuda")
        ):
            yield f"line {node.lineno}: {node.value!r}"
        elif isinstance(node, ast.Attribute) and node.attr in ("cuda", "is_cuda", "is_cpu"):
            yield f"line {node.lineno}: .{node.attr}"


def test_one_module_names_kinds_of_device() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if not name.startswith(tuple(MAY_NAME_DEVICES)):
            found += [f"{name}, {line}" for line in names_of_devices(path.read_text())]
    assert found == []


@pytest.mark.parametrize("source", ["x.cuda()", "x.to('cuda:1')", "torch.cuda.synchronize()", "f(device='cpu')"])
def test_the_scan_finds_what_it_looks_for(source: str) -> None:
    assert list(names_of_devices(source))


@pytest.mark.parametrize(
    ("choice", "has_gpu", "kind"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_the_kind_that_is_chosen(
    choice: DeviceChoice, has_gpu: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert kind_of(choice) == kind


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_there_is_refused_in_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"^--device cuda: PyTorch finds no GPU on this machine; .* auto or cpu here$"
    ):
        Device("cuda")
    with pytest.raises(ConfigError, match="--device cuda"):
        check_world_size(DiffusionParallelConfig(), "cuda")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("backend", ["mp", "uni"])
def test_so_is_an_engine_before_a_worker_starts(backend: str) -> None:
    with pytest.raises(ConfigError, match="--device cuda"):
        make_executor(make_config(device="cuda", distributed_executor_backend=backend), FAKE_INFO)


def test_automatic_types_follow_the_device() -> None:
    cpu = Device("cpu")
    assert (cpu.dtype("auto"), cpu.dtype("float16")) == (torch.float32, torch.float16)


def test_a_cpu_takes_as_many_workers_as_it_may_whatever_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_world_size(DiffusionParallelConfig(ulysses_degree=2), "cpu")
    with pytest.raises(ConfigError, match="this machine has 1 GPUs"):
        check_world_size(DiffusionParallelConfig(ulysses_degree=2), "auto")


def test_on_a_cpu_streams_marks_and_downloads_are_done_at_once() -> None:
    device = Device("cpu")
    x = torch.arange(12, dtype=torch.uint8).reshape(2, 2, 3)
    before = Mark(device)
    with device.stream(beside=True).after([x]):
        wait = device.download({"x": x + 1})
    after = Mark(device)
    assert (wait()["x"] == np.arange(1, 13).reshape(2, 2, 3)).all()
    after.wait()
    assert after.seconds_since(before) >= 0


def test_a_stopwatch_adds_up_by_stage() -> None:
    watch = Stopwatch(Device("cpu"))
    for stage in ("a", "b", "a"):
        with watch.measure(stage):
            torch.ones(10).sum()
    with pytest.raises(KeyError), watch.measure("b"):
        raise KeyError
    seconds = watch.seconds()
    assert set(seconds) == {"a", "b"}
    assert min(seconds.values()) > 0


@pytest.mark.parametrize(("works_ahead", "num_threads"), [(True, 1), (False, 2)])
def test_a_host_that_feeds_a_device_shares_no_operation(
    tiny_model: Path, works_ahead: bool, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "works_ahead", works_ahead)
    monkeypatch.setattr(warmup, "choose_num_threads", lambda *_: None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        config = OmniDiffusionConfig(str(tiny_model), enforce_eager=True)
        ModelRunner(config, load_model_info(str(tiny_model))).start()
        assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "lacking", [torch.OutOfMemoryError("no room"), RuntimeError("CUDA error: out of memory\nSearch")]
)
@pytest.mark.parametrize("failures", [1, 2])
def test_a_recording_that_lacks_memory_is_tried_once_more(
    monkeypatch: pytest.MonkeyPatch, lacking: Exception, failures: int
) -> None:
    capturer = CudaGraphCapturer.__new__(CudaGraphCapturer)  # without its stream, which the CPU does not have
    attempts: list[int] = []

    def capture(run: object) -> tuple[str, object]:
        attempts.append(1)
        if len(attempts) <= failures:
            raise lacking
        return "output", run

    monkeypatch.setattr(capturer, "_capture_in_pool", capture)
    if failures == 1:
        assert capturer.capture(lambda: None)[0] == "output"
    else:
        with pytest.raises(torch.OutOfMemoryError):
            capturer.capture(lambda: None)
    assert len(attempts) == 2


def test_a_recording_that_fails_otherwise_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    capturer = CudaGraphCapturer.__new__(CudaGraphCapturer)
    errors = iter([RuntimeError("not permitted when stream is capturing")])
    monkeypatch.setattr(capturer, "_capture_in_pool", lambda run: (_ for _ in ()).throw(next(errors)))
    with pytest.raises(RuntimeError, match="not permitted"):
        capturer.capture(lambda: None)


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_paused_and_then_as_before(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with no_garbage_collection():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
        with suppress(KeyError), no_garbage_collection():
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
