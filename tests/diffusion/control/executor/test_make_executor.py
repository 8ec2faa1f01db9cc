"""How many devices there must be; no process is started here."""

from __future__ import annotations

import pytest
import torch

from testbed.fakes import make_config
from testbed.live_server import FAKE_INFO
from vllm_omni.diffusion.control.executor import make_executor
from vllm_omni.diffusion.control.executor.multiproc import MultiprocExecutor
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.errors import ConfigError


def make(parallel: DiffusionParallelConfig) -> None:
    executor = make_executor(make_config(parallel=parallel), FAKE_INFO)
    assert isinstance(executor, MultiprocExecutor)
    assert executor.worker_pids == []


def test_workers_get_the_folder_and_no_token() -> None:
    hub_model = make_config(
        model="org/painter", revision="v1", download_dir="/models", hf_token="hf_secret", dtype="half"
    )
    executor = make_executor(hub_model, FAKE_INFO)
    assert isinstance(executor, MultiprocExecutor)
    assert executor._config == make_config(model=str(FAKE_INFO.path), dtype="float16")


def test_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    make(DiffusionParallelConfig(2, 2))
    with pytest.raises(ConfigError) as caught:
        make(DiffusionParallelConfig(ulysses_degree=3, data_parallel_size=2))
    assert str(caught.value) == (
        "data 2 x cfg 1 x ring 1 x ulysses 3 x tensor 1 = 6 devices are too many: this machine has 4 GPUs"
    )


def test_a_cpu_takes_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make(DiffusionParallelConfig(2, 2, 2, 2))
    with pytest.raises(ConfigError, match="= 17 devices are too many: a CPU takes at most 16 workers"):
        make(DiffusionParallelConfig(17))
