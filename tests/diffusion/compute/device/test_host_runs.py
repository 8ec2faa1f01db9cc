"""Host memory that ranks share: one copy of equal weights, found by its place in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.worker.replica import started
from tests.diffusion.compute.worker.test_layouts import BUILDERS
from vllm_omni.diffusion.compute.device.host_runs import SharedRuns
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.worker import RankInfo

CPU = torch.device("cpu")
LAYERWISE: dict[str, Any] = {"enable_layerwise_offload": True, "resident_layers": 0}
TURNS: dict[str, Any] = {"enable_cpu_offload": True}


def place_of(run: torch.Tensor) -> tuple[str, int]:
    """Inode of the file that is mapped where a run lies, and the place in it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, offset, _, inode, *_ = line.split()
        first, end = (int(address, 16) for address in addresses.split("-"))
        if first <= run.data_ptr() < end:
            return inode, int(offset, 16) + run.data_ptr() - first
    raise AssertionError("the run is mapped nowhere")


def test_ranks_write_and_read_the_same_bytes() -> None:
    told: list[float] = []

    def tell(value: float) -> float:
        told.append(value)
        return value

    one = SharedRuns.of_ranks(tell, 0, 3, CPU)
    heard = iter(told)
    two = SharedRuns.of_ranks(lambda _: next(heard), 1, 3, CPU)
    runs = [[shared.run(region, size) for region, size in ((2, 5000), (2, 10), (0, 7))] for shared in (one, two)]
    runs[0][1].fill_(3)
    assert runs[1][1].tolist() == [3] * 10
    assert not runs[1][0].any()
    assert not runs[1][2].any()
    assert one.run(1, 0).numel() == 0


def places(place: RankInfo, parallel: DiffusionParallelConfig, path: Path, settings: dict[str, Any]) -> Any:
    """Places of a rank's runs, by component."""
    pipeline: Any = started(place, parallel, path, **settings).pipeline
    if pipeline.layer_offload is None:
        return {name: [place_of(run) for run in its.host] for name, its in pipeline.turns._components.items()}
    units = pipeline.layer_offload.streamed_units
    return {"all": [place_of(unit.run) for unit in units]}


@pytest.mark.parametrize("settings", [LAYERWISE, TURNS], ids=["layerwise", "turns"])
@pytest.mark.parametrize("degree", ["ulysses_degree", "tensor_parallel_size"])
def test_a_replica_keeps_one_copy_of_its_weights(tmp_path: Path, degree: str, settings: dict[str, Any]) -> None:
    """Ranks of a tensor group have shares of the transformer, and all else in common."""
    path = BUILDERS["qwen_image"](tmp_path / "model", heads=4, text_kv_heads=2)
    parallel = DiffusionParallelConfig(**{degree: 2})
    one, two = run_places(places, parallel, parallel, path, settings)
    assert one.keys() == two.keys()
    assert len({inode for its in (*one.values(), *two.values()) for inode, _ in its}) == 1
    for name, its in one.items():
        if degree == "ulysses_degree" or name in ("text_encoder", "vae"):
            assert its == two[name], name
        else:
            assert its != two[name], name
            if name == "transformer":
                assert not set(its) & set(two[name])
