"""Ranks that exchange tensors for the keys of a text make the same exchanges after a failure on one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from testbed.runner_driver import kept
from testbed.tiny_wan import build_tiny_wan
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.families.wan.test_videos import SMALL, request
from tests.diffusion.compute.worker.replica import merging, started
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.plan import DecodePiece, StepPlan
from vllm_omni.diffusion.messages.worker import RankInfo

TENSOR = DiffusionParallelConfig(tensor_parallel_size=2)
SHARED_ENCODER = DiffusionParallelConfig(ulysses_degree=2, text_encoder_tp_size=2)
SETTINGS: dict[str, Any] = {**SMALL, "num_inference_steps": 1, "max_sequence_length": 24}


def encode_after_failed_piece(place: RankInfo, parallel: DiffusionParallelConfig, path: Path) -> Any:
    """Rank 1 fails in a piece; before all ranks have dropped the state, the same text comes again."""
    runner = started(place, parallel, path)
    pipeline: Any = runner.pipeline
    merge, decode_next = merging(runner), pipeline.decode_next

    def fail(*_: Any) -> None:
        raise RuntimeError("poisoned")

    results = []

    def execute(plan: StepPlan) -> None:
        results.append(merge(runner.execute(plan)))

    execute(StepPlan(0, new_requests=[request("first", "a red apple", seed=1, **SETTINGS)], encode=["first"]))
    execute(StepPlan(1, denoise=["first"]))
    pipeline.decode_next = fail
    execute(StepPlan(2, decode=["first"], pieces={"first": DecodePiece(0, 1, 1)}))
    pipeline.decode_next = decode_next
    execute(StepPlan(3, new_requests=[request("again", "a red apple", seed=1, **SETTINGS)], encode=["again"]))
    execute(StepPlan(4, denoise=["again"], release=["first"]))
    latents = runner.states["again"].latents.numpy().copy()
    execute(StepPlan(5, release=["again"]))
    errors = {i: error.kind for result in results for i, error in result.errors.items()}
    return errors, latents, kept(runner)


@pytest.mark.parametrize("parallel", [TENSOR, SHARED_ENCODER], ids=["tensor", "text encoder"])
def test_a_piece_that_failed_on_one_rank_changes_no_later_encode(
    tmp_path: Path, parallel: DiffusionParallelConfig
) -> None:
    path = build_tiny_wan(tmp_path / "model", heads=4, default_sampling_params=SMALL)
    results = run_places(encode_after_failed_piece, parallel, parallel, path)
    for errors, latents, num_kept in results:
        assert errors == {"first": "internal"}
        assert abs(latents - results[0][1]).max() < 1e-5
        assert num_kept == 0
