"""After an error on one rank, all ranks keep and drop the same tensors of a step cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from testbed.runner_driver import kept, make_request
from tests.diffusion.compute.cache.settings import settings_of
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.worker.replica import merging, started
from tests.diffusion.compute.worker.test_rank_faults import fail_at
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.plan import StepPlan
from vllm_omni.diffusion.messages.worker import RankInfo

TENSOR = DiffusionParallelConfig(tensor_parallel_size=2)
"""Both ranks hold all hidden states, so different forecasts on them would spoil the pictures."""
REQUESTS = [make_request(i, "", num_inference_steps=14, seed=seed) for seed, i in enumerate("abc")]
FAULTY_STEP = 8
Run = tuple[list[int], dict[str, np.ndarray], dict[str, str], int]
"""Bytes that the rank's step cache holds after each plan; final latents; errors; states left at the end."""


def denoise(place: RankInfo, parallel: DiffusionParallelConfig, path: Path, room: float, stage: str | None) -> Run:
    """All steps of `REQUESTS`; each plan is made before the result of the one before it is known."""
    runner = started(place, parallel, path, cache_backend="cache_dit", cache_config=settings_of("cache_dit"))
    pipeline, merge = runner.pipeline, merging(runner)
    pipeline.step_cache.budget.max_bytes = room
    latents: dict[str, np.ndarray] = {}
    forget = pipeline.forget

    def forget_noting(state: Any) -> None:
        latents[state.request.request_id] = state.latents.numpy().copy()
        forget(state)

    pipeline.forget = forget_noting  # type: ignore[method-assign]
    ids = [request.request_id for request in REQUESTS]
    merge(runner.execute(StepPlan(0, new_requests=[*REQUESTS], encode=ids)))
    held, errors = list[int](), dict[str, str]()
    going, known = ids, set[str]()
    for step in range(1, REQUESTS[0].num_inference_steps + 1):
        if stage is not None and step == FAULTY_STEP and place.rank == 1:
            fail_at(runner, stage, "b", RuntimeError("poisoned"))
        release = [i for i in going if i in known]
        going = [i for i in going if i not in known]
        known = set(errors)
        result = runner.execute(StepPlan(step, denoise=going, release=release))
        held.append(result.cache_bytes)
        errors |= {i: error.message for i, error in merge(result).errors.items()}
    merge(runner.execute(StepPlan(100, release=going)))
    return held, latents, errors, kept(runner)


@pytest.mark.parametrize("stage", ["attention", "advance"])
def test_ranks_drop_alike_after_an_error_on_one_of_them(calm_model: Path, stage: str) -> None:
    ((all_held, _, _, _), _) = run_places(denoise, TENSOR, TENSOR, calm_model, 2.0**32, None)
    room = 0.8 * max(all_held)  # for two of the three requests
    first, second = run_places(denoise, TENSOR, TENSOR, calm_model, room, stage)
    assert first[2] == second[2] == {"b": "poisoned"}
    assert first[0] == second[0], "bytes held after each plan"
    assert 0 < max(first[0]) <= room
    for request_id in "ac":
        assert abs(first[1][request_id] - second[1][request_id]).max() < 1e-4
    assert first[3] == second[3] == 0
