"""Components take turns on every rank of a layout: the pictures of one process, and the same turns on all ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from testbed.runner_driver import QUICK, Drive
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.offload.strict_turns import CountingMemory, StrictTurns, turns_of
from tests.diffusion.compute.worker.replica import merging
from tests.diffusion.compute.worker.test_layouts import ARRIVALS, BUILDERS, check_equal, placed_in_turn
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.families import component_loader
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.messages.worker import RankInfo


class NotedMemory(CountingMemory):
    """Also notes which components came, in order, without the VAE: ranks share pictures for decodes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.came: list[str] = []

    def take(self, name: str, num_bytes: int) -> Tensor:
        if name != "vae" and self.came[-1:] != [name]:
            self.came.append(name)
        return super().take(name, num_bytes)


def draw(
    place: RankInfo, parallel: DiffusionParallelConfig, path: Path, offload: bool
) -> tuple[dict[str, np.ndarray], list[str]]:
    config = OmniDiffusionConfig(model=str(path), parallel=parallel, enable_cpu_offload=offload)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            component_loader, "Turns", lambda device, is_on, **_: StrictTurns(device, is_on, NotedMemory(device))
        )
        runner = ModelRunner(config, load_model_info(str(path)), place, replace(QUICK, turns_bytes=1))
        runner.start()
    drive = Drive(runner, partial(placed_in_turn, parallel.cfg_parallel_size), merging(runner)).run(ARRIVALS)
    assert drive.errors == {}
    its = turns_of(runner)
    assert isinstance(its.memory, NotedMemory)
    assert its.memory.num_bytes == (its.residency.num_bytes if offload else 0)
    return drive.images, its.memory.came


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BUILDERS["qwen_image"](tmp_path_factory.mktemp("models") / "model", heads=4)


@pytest.fixture(scope="module")
def wanted(model: Path) -> dict[str, np.ndarray]:
    alone = DiffusionParallelConfig()
    pictures: dict[str, np.ndarray]
    ((pictures, came),) = run_places(draw, alone, alone, model, False)
    assert came == []
    return pictures


@pytest.mark.parametrize(
    "parallel",
    [
        DiffusionParallelConfig(tensor_parallel_size=2, vae_patch_parallel_size=2),
        DiffusionParallelConfig(ulysses_degree=2),
        pytest.param(DiffusionParallelConfig(ring_degree=2), marks=pytest.mark.layouts),
        pytest.param(DiffusionParallelConfig(cfg_parallel_size=2, text_encoder_tp_size=2), marks=pytest.mark.layouts),
    ],
    ids=["tensor", "ulysses", "ring", "cfg"],
)
def test_all_ranks_take_the_same_turns(
    model: Path, wanted: dict[str, np.ndarray], parallel: DiffusionParallelConfig
) -> None:
    (first, came), *others = run_places(draw, parallel, parallel, model, True)
    check_equal(first, wanted)
    assert {"text_encoder", "transformer"} <= set(came)
    for pictures, came_there in others:
        check_equal(pictures, wanted)
        assert came_there == came
