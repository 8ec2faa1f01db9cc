"""An error in a decode that some ranks of a replica share: only its request fails, and no rank starts again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d

from testbed.runner_driver import kept
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.worker.scheduled_replica import Replica
from tests.diffusion.compute.worker.test_video_pieces import ALONE, ONE_RANK, REQUESTS, assert_same, start
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.worker import RankInfo

PICTURES = [replace(REQUESTS[1], request_id=name, seed=seed) for name, seed in (("bad picture", 4), ("picture", 2))]
VIDEOS = [replace(REQUESTS[0], request_id=name, seed=seed) for name, seed in (("bad", 1), ("good", 5), ("third", 6))]
FAILING = {"bad", "bad picture"}
STAGES: dict[str, tuple[type[Any], str]] = {"tile": (WanDecoder3d, "forward"), "blend": (AutoencoderKLWan, "blend_h")}
"""Point of a shared decode -> method that runs there: before the exchange, or after it on the group's first rank."""


def fail_in_decodes(pipeline: Any, stage: str) -> None:
    """Make decodes of `FAILING` raise at `stage`, in this process. `begin` is before all work of the decode."""
    running: set[str] = set()

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(pipeline, name)

        def noting(subject: Any, *rest: Any) -> Any:
            running.clear()
            running.update([one.request_id for one in subject] if name == "decode" else [subject.request.request_id])
            if stage == "begin":
                fail()
            return original(subject, *rest)

        return noting

    def fail() -> None:
        if running & FAILING:
            raise RuntimeError("poisoned")

    for name in ("decode", "decode_next"):
        setattr(pipeline, name, watched(name))
    if stage != "begin":
        cls, method = STAGES[stage]
        original = getattr(cls, method)

        def failing(*args: Any, **keywords: Any) -> Any:
            fail()
            return original(*args, **keywords)

        setattr(cls, method, failing)  # in a process of its own


def run_with_fault(place: RankInfo, parallel: DiffusionParallelConfig, path: Path, guilty: int, stage: str) -> Any:
    runner = start(path, place, parallel)
    if place.rank == guilty:
        fail_in_decodes(runner.pipeline, stage)
    replica = Replica(runner, parallel)
    replica.add([*VIDEOS, *PICTURES])
    made = replica.run()
    return made, {i: error.message for i, error in replica.errors.items()}, kept(runner)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    replica = Replica(start(tmp_path_factory.mktemp("toy"), ALONE, ONE_RANK), ONE_RANK)
    replica.add([*VIDEOS, *PICTURES])
    return replica.run()


@pytest.mark.parametrize(
    ("num_ranks", "guilty", "stage"),
    [
        (2, 1, "begin"),
        pytest.param(2, 0, "blend", marks=pytest.mark.thorough),
        pytest.param(4, 1, "tile", marks=pytest.mark.thorough),
    ],
)
def test_an_error_in_a_shared_decode_fails_one_request(
    tmp_path: Path, whole: dict[str, np.ndarray], one_thread: None, num_ranks: int, guilty: int, stage: str
) -> None:
    parallel = DiffusionParallelConfig(ulysses_degree=num_ranks, vae_patch_parallel_size=2)
    for made, errors, num_kept in run_places(run_with_fault, parallel, parallel, tmp_path, guilty, stage):
        assert "bad" in errors
        assert set(errors.values()) == {"poisoned"}
        assert made.keys() == whole.keys() - errors.keys() >= {"good", "third", "picture"}
        assert_same(made, {name: whole[name] for name in made})
        assert num_kept == 0
