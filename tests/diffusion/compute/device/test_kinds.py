"""The choice of a kind of device, how many there are, and a scan: no other package names kinds of device."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import vllm_omni
from testbed.fakes import make_config
from testbed.live_server import FAKE_INFO
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.device.kinds import check_world_size, kind_of
from vllm_omni.diffusion.control.executor import make_executor
from vllm_omni.diffusion.data import DeviceChoice, DiffusionParallelConfig
from vllm_omni.errors import ConfigError

PACKAGE = Path(vllm_omni.__file__).parent
MAY_NAME_DEVICES = {
    "diffusion/compute/device": "the package that knows kinds of device",
    "diffusion/control/compiled_packages.py": "builds of PyTorch and its companions are for a version of CUDA",
    "platforms.py": "a name of the public vllm-omni package, whose scripts ask it for the kind of device",
    "diffusion/data.py": "the values of --device",
    "diffusion/compute/attention": "kernels are of a kind of device",
    "diffusion/compute/offload/copies.py": "copies beside other work are of a kind of device",
}


def names_of_devices(source: str) -> Iterator[str]:
    """String literals of kinds of device, and attributes such as `.cuda`."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.split(":")[0] in ("cpu", "cuda")
        ):
            yield f"line {node.lineno}: {node.value!r}"
        elif isinstance(node, ast.Attribute) and node.attr in ("cuda", "is_cuda", "is_cpu"):
            yield f"line {node.lineno}: .{node.attr}"


def test_only_the_listed_modules_name_kinds_of_device() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if not name.startswith(tuple(MAY_NAME_DEVICES)):
            found += [f"{name}, {line}" for line in names_of_devices(path.read_text())]
    assert found == []


@pytest.mark.parametrize("source", ["x.cuda()", "x.to('cuda:1')", "torch.cuda.synchronize()", "f(device='cpu')"])
def test_the_scan_finds_names_of_devices(source: str) -> None:
    assert list(names_of_devices(source))


@pytest.mark.parametrize(
    ("choice", "has_gpu", "kind"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_the_chosen_kind(choice: DeviceChoice, has_gpu: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert kind_of(choice) == kind


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_a_missing_gpu_is_refused_in_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"^--device cuda: PyTorch finds no GPU on this machine; .* auto or cpu here$"
    ):
        Device("cuda")
    with pytest.raises(ConfigError, match="--device cuda"):
        check_world_size(DiffusionParallelConfig(), "cuda")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("backend", ["mp", "uni"])
def test_a_missing_gpu_is_refused_before_a_worker_starts(backend: str) -> None:
    with pytest.raises(ConfigError, match="--device cuda"):
        make_executor(make_config(device="cuda", distributed_executor_backend=backend), FAKE_INFO)


def test_the_number_of_gpus_does_not_limit_cpu_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_world_size(DiffusionParallelConfig(ulysses_degree=2), "cpu")
    with pytest.raises(ConfigError, match="this machine has 1 GPUs"):
        check_world_size(DiffusionParallelConfig(ulysses_degree=2), "auto")
