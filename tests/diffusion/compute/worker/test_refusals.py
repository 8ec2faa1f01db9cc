"""A request that the model cannot run costs ranks that share an encode nothing, also where they could not reconnect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testbed.runner_driver import Drive, kept, make_request
from testbed.tiny_models import SMALL, build_tiny_qwen_image
from testbed.tiny_wan import build_tiny_wan
from testbed.tiny_z_image import build_tiny_z_image
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.worker.replica import merging, started
from vllm_omni.diffusion.compute.distributed.mesh import World
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.worker import RankInfo

TENSOR = DiffusionParallelConfig(tensor_parallel_size=2)
SHARED_ENCODER = DiffusionParallelConfig(ulysses_degree=2, text_encoder_tp_size=2)
EQUAL_LEVELS = (0.5, 0.5 - 1e-12)


def draw(place: RankInfo, parallel: DiffusionParallelConfig, path: Path, wrong: dict[str, Any]) -> Any:
    World.can_rebuild = property(lambda self: False)  # type: ignore[assignment,method-assign]  # in a process of its own
    runner = started(place, parallel, path)
    size: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 24}
    requests = [make_request("bad", **size, **wrong), make_request("good", **size)]
    drive = Drive(runner, merge=merging(runner)).run({0: requests})
    errors = {i: (error.kind, error.param) for i, error in drive.errors.items()}
    return set(drive.images), errors, kept(runner), runner.ranks.num_attempts


@pytest.mark.parametrize(
    ("build", "changes", "parallel", "wrong"),
    [
        (build_tiny_wan, {"heads": 4}, TENSOR, {"sigmas": EQUAL_LEVELS}),
        (build_tiny_qwen_image, {"heads": 4, "text_kv_heads": 2}, SHARED_ENCODER, {"flow_shift": float("nan")}),
        (build_tiny_z_image, {"heads": 4, "text_kv_heads": 2}, SHARED_ENCODER, {"sigmas": (float("nan"), 0.5)}),
    ],
)
def test_a_schedule_that_cannot_run_is_refused(
    tmp_path: Path,
    build: Callable[..., Path],
    changes: dict[str, Any],
    parallel: DiffusionParallelConfig,
    wrong: dict[str, Any],
) -> None:
    path, (name,) = build(tmp_path / "model", default_sampling_params=SMALL, **changes), wrong
    for images, errors, num_kept, num_attempts in run_places(draw, parallel, parallel, path, wrong):
        assert images == {"good"}
        assert errors == {"bad": ("invalid", name)}
        assert num_kept == 0
        assert num_attempts > 0
