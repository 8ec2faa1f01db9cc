"""Pictures with adapters of parallel layouts equal those of one process, which tests/.../test_adapters.py compares with
diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from testbed.tiny_adapters import Pair, random_pairs, save_peft, transformer_of
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.families.test_adapters import no_single_runs  # noqa: F401  # a fixture
from tests.diffusion.compute.worker.test_layouts import ARRIVALS_OF, BUILDERS, Arrivals, check_equal, draw
from vllm_omni.diffusion.data import DiffusionParallelConfig
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
    scope="module", params=["qwen_image", *(pytest.param(f, marks=pytest.mark.thorough) for f in ("z_image", "wan"))]
)
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return Adapted(request.param, tmp_path_factory.mktemp(request.param))


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
