"""Pictures with adapters of parallel layouts equal those of one process, which tests/.../test_adapters.py compares with
diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from testbed.runner_driver import Drive, make_request
from testbed.tiny_adapters import Pair, random_pairs, save_peft, transformer_of
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.families.test_adapters import no_single_runs  # noqa: F401  # a fixture
from tests.diffusion.compute.worker.replica import merging, started
from tests.diffusion.compute.worker.test_layouts import ARRIVALS_OF, BUILDERS, Arrivals, check_equal, draw
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.plan import ItemError, StepPlan
from vllm_omni.diffusion.messages.request import LoRA
from vllm_omni.diffusion.messages.worker import RankInfo

HEADS = 4


class Adapted:
    """A model, requests with and without adapters, and the pictures of one process."""

    def __init__(self, family: str, folder: Path) -> None:
        self.path = BUILDERS[family](folder / "model", heads=HEADS)
        components = ("transformer", "transformer_2") if family == "wan" else ("transformer",)
        weights: dict[str, Pair] = {}
        for component in components:  # small, because some values of a random model grow from block to block
            pairs = random_pairs(transformer_of(self.path, component), 1, size=0.3)
            weights |= {f"{component}.{name}": pair for name, pair in pairs.items()}
        every = save_peft(weights, folder / "every.safetensors", prefix="")
        some = {name: pair for name, pair in weights.items() if "to_" in name}
        few = save_peft(some, folder / "few.safetensors", prefix="")
        a, b = LoRA("every", str(every), 0.8), LoRA("few", str(few), 0.5)
        self.arrivals: Arrivals = {
            step: [
                replace(request, loras={"guided": (a,), "short": (b, a), "tall": (b,)}.get(request.request_id, ()))
                for request in requests
            ]
            for step, requests in ARRIVALS_OF[family].items()
        }
        threads = torch.get_num_threads()
        self.wanted, errors = draw(RankInfo(), DiffusionParallelConfig(), self.path, arrivals=self.arrivals)
        plain, _ = draw(RankInfo(), DiffusionParallelConfig(), self.path, arrivals=ARRIVALS_OF[family])
        torch.set_num_threads(threads)
        assert not errors
        for name, values in self.wanted.items():
            assert np.array_equal(values, plain[name]) == ("wide" in name), "adapters show, and in their requests alone"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("qwen_image", marks=pytest.mark.thorough),
        *(pytest.param(family, marks=pytest.mark.layouts) for family in ("z_image", "wan")),
    ],
)
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return Adapted(request.param, tmp_path_factory.mktemp(request.param))


def abort_between(
    place: RankInfo, parallel: DiffusionParallelConfig, path: Path, first: LoRA, second: LoRA
) -> tuple[dict[str, np.ndarray], dict[str, ItemError]]:
    """Pictures of two equal requests; between them, the abort of another reaches rank 1 before its plan."""
    runner = started(place, parallel, path)
    merge = merging(runner)
    drive = Drive(runner, merge=merge).run({0: [make_request("before", loras=(first,))]})
    other = make_request("other", loras=(second,))
    if place.rank == 1:
        runner.abort(["other"])
    for plan in (
        StepPlan(100, new_requests=[other], encode=["other"]),
        StepPlan(101, release=["other"], drop_adapters=[other.loras[0].key]),
    ):
        merge(runner.execute(plan))
    after = Drive(runner, merge=merge).run({0: [make_request("after", loras=(first,))]})
    return drive.images | after.images, drive.errors | after.errors


@pytest.mark.thorough
def test_ranks_stay_together_after_an_abort_that_reaches_one_of_them_first(tmp_path: Path) -> None:
    path = BUILDERS["qwen_image"](tmp_path / "model", heads=HEADS)
    transformer = transformer_of(path)
    loras = [
        LoRA(name, str(save_peft(random_pairs(transformer, seed, size=0.3), tmp_path / f"{name}.safetensors")), 0.8)
        for seed, name in enumerate(("first", "second"))
    ]
    parallel = DiffusionParallelConfig(tensor_parallel_size=2)
    for pictures, errors in run_places(abort_between, parallel, parallel, path, *loras):
        assert not errors
        assert np.array_equal(pictures["before"], pictures["after"])


@pytest.mark.parametrize(
    "parallel",
    [
        DiffusionParallelConfig(ulysses_degree=2, cfg_parallel_size=2),
        DiffusionParallelConfig(ring_degree=2, tensor_parallel_size=2),
    ],
    ids=["ulysses and cfg", "ring and tensor"],
)
def test_pictures_with_adapters_equal_those_of_one_process(adapted: Adapted, parallel: DiffusionParallelConfig) -> None:
    for drawn, errors in run_places(draw, parallel, parallel, adapted.path, False, adapted.arrivals):
        assert not errors
        check_equal(drawn, adapted.wanted)
