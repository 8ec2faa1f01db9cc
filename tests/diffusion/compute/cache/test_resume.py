"""A request that resumes beside a step cache: its first step is computed, and later ones are reused again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from testbed.runner_driver import kept, make_request, psnr
from tests.diffusion.compute.cache.driving import started, watch_skips
from tests.diffusion.compute.cache.settings import settings_of
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.worker.replica import started as on_ranks
from tests.diffusion.compute.worker.scheduled_replica import Replica
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.checkpoint import Checkpoint
from vllm_omni.diffusion.messages.worker import RankInfo

LONG = make_request("long", negative_prompt="a blue car", num_inference_steps=16, seed=3, true_cfg_scale=3.0)
OTHER = make_request("other", "a photo", height=48, width=96, num_inference_steps=12, seed=4)


def test_the_first_step_after_a_resume_is_computed(calm_model: Path, backend: str) -> None:
    runner = started(calm_model, backend, settings_of(backend))
    skips = watch_skips(runner)
    replica = Replica(runner, DiffusionParallelConfig())
    replica.add([LONG], checkpoint_seconds=1e-9)
    undisturbed = replica.run()["long"]
    reused = skips["long"][0]
    assert len(reused) > 3, "a cache that skips nothing proves nothing"

    step = reused[1]
    (checkpoint,) = [c for c in replica.checkpoints["long"] if c.step == step]
    replica.add([replace(LONG, request_id="resumed")], resume=checkpoint)
    replica.add([OTHER])
    resumed = replica.run()["resumed"]
    for branch in skips["resumed"]:
        assert branch, "the cache serves the request again"
        assert min(branch) > step
    assert psnr(resumed, undisturbed) > 20
    assert not np.array_equal(resumed, undisturbed), "a step that was reused is computed now"
    assert kept(runner) == 0


def resume_on(
    place: RankInfo, parallel: DiffusionParallelConfig, path: Path, backend: str, checkpoint: Checkpoint
) -> dict[str, np.ndarray]:
    """Pixels of a request that resumes beside another one, on these ranks."""
    settings = settings_of(backend)
    runner = on_ranks(place, parallel, path, cache_backend=backend, cache_config=settings)
    replica = Replica(runner, parallel)
    replica.add([replace(LONG, request_id="resumed")], resume=checkpoint)
    replica.add([OTHER])
    made = replica.run()
    assert not replica.errors
    return made


@pytest.mark.thorough
@pytest.mark.parametrize("degrees", [{"ulysses_degree": 2}, {"ring_degree": 2, "cfg_parallel_size": 2}])
def test_ranks_decide_alike_after_a_resume(calm_model: Path, backend: str, degrees: dict[str, int]) -> None:
    alone, parallel = DiffusionParallelConfig(), DiffusionParallelConfig(**degrees)
    replica = Replica(started(calm_model, backend, settings_of(backend)), alone)
    replica.add([LONG], checkpoint_seconds=1e-9)
    replica.run()
    checkpoint = replica.checkpoints["long"][5]
    wanted = resume_on(RankInfo(), alone, calm_model, backend, checkpoint)
    for made in run_places(resume_on, parallel, parallel, calm_model, backend, checkpoint):
        assert made.keys() == wanted.keys()
        assert all(psnr(made[i], wanted[i]) >= 60 for i in wanted)
