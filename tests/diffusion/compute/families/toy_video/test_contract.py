"""The contract of a packed family carries static keys, several frames and two transformers, shown by a toy family."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from testbed.runner_driver import QUICK, Drive, kept, make_request
from testbed.toy_video import ToyPipeline, ToyState, toy_info
from tests.diffusion.compute.cache.driving import watch_skips
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.families.test_cuda_graphs import Capturer
from tests.diffusion.compute.worker.replica import merging
from tests.diffusion.compute.worker.test_layouts import placed_in_turn
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.startup import model_start
from vllm_omni.diffusion.compute.startup.compiling import run_variants
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.diffusion.messages.worker import RankInfo

ALONE = RankInfo()
ARRIVALS: dict[int, list[DiffusionRequest]] = {
    0: [
        make_request("video", "a red apple", negative_prompt="", num_frames=9, num_inference_steps=6, seed=1),
        make_request("picture", "sea", height=48, width=80, num_inference_steps=8, seed=2),
    ],
    2: [make_request("long", "a blue car " * 3, num_frames=5, height=16, negative_prompt="no", seed=3)],
    3: [make_request("one step", "x", num_frames=13, height=32, num_inference_steps=1, seed=4)],
}
REQUESTS = [request for joining in ARRIVALS.values() for request in joining]


@pytest.fixture(autouse=True)
def toy_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_start, "pipeline_class", lambda family: ToyPipeline)


def started(path: Path, place: RankInfo = ALONE, **settings: Any) -> tuple[ModelRunner, ToyPipeline]:
    runner = ModelRunner(OmniDiffusionConfig(str(path), **settings), toy_info(path), place, QUICK)
    runner.start()
    pipeline: Any = runner.pipeline
    return runner, pipeline


def check(drawn: dict[str, np.ndarray], pipeline: ToyPipeline, requests: Sequence[DiffusionRequest] = REQUESTS) -> None:
    assert set(drawn) == {request.request_id for request in requests}
    for request in requests:
        pixels, wanted = drawn[request.request_id].astype(int), pipeline.alone(request).numpy().astype(int)
        assert pixels.shape[-3:] == (request.height, request.width, 3)
        assert pixels.shape[:-3] == ((request.num_frames,) if request.num_frames > 1 else ())
        assert wanted.std() > 20
        assert np.abs(pixels - wanted).max() <= 1


def test_a_mixed_batch_draws_what_each_request_draws_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, pipeline = started(tmp_path)
    used: list[set[int]] = []
    predict = pipeline.predict

    def watched(states: Sequence[ToyState], groups: Any) -> Any:
        used.append({pipeline.transformer_index(state) for state in states})
        return predict(states, groups)

    monkeypatch.setattr(pipeline, "predict", watched)
    drive = Drive(runner).run(ARRIVALS)
    assert not drive.errors
    assert {0} in used, "the second transformer is idle"
    assert {0, 1} in used, "both compute in one step"
    assert {1} in used, "the first transformer is idle"
    check(drive.images, pipeline)
    assert kept(runner) == 0


def draw_on_ranks(place: RankInfo, parallel: DiffusionParallelConfig, path: Path) -> dict[str, np.ndarray]:
    runner, _ = started(path, place, parallel=parallel)
    drive = Drive(runner, partial(placed_in_turn, parallel.cfg_parallel_size), merging(runner)).run(ARRIVALS)
    assert not drive.errors
    return drive.images


@pytest.mark.parametrize(
    ("ulysses", "ring", "cfg"), [(2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2)], ids=["ulysses", "ring", "both", "cfg"]
)
def test_ranks_draw_the_same(tmp_path: Path, ulysses: int, ring: int, cfg: int) -> None:
    parallel = DiffusionParallelConfig(ulysses_degree=ulysses, ring_degree=ring, cfg_parallel_size=cfg)
    _, alone = started(tmp_path)
    for drawn in run_places(draw_on_ranks, parallel, parallel, tmp_path):
        check(drawn, alone)


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_step_cache_starts_anew_with_the_second_transformer(tmp_path: Path, warmup: int) -> None:
    """Also, sequences that do not skip go on with their own static keys."""
    config = {"max_warmup_steps": warmup, "residual_diff_threshold": 1.0}
    settings: dict[str, Any] = {"cache_backend": "cache_dit", "cache_config": config}
    runner, pipeline = started(tmp_path, **settings)
    skips = watch_skips(runner)
    drive = Drive(runner).run(ARRIVALS)
    assert not drive.errors
    for request in REQUESTS:
        lonely, _ = started(tmp_path, **settings)
        skips_alone = watch_skips(lonely)
        (alone,) = Drive(lonely).run({0: [request]}).images.values()
        assert skips[request.request_id] == skips_alone[request.request_id]
        assert np.abs(drive.images[request.request_id].astype(int) - alone).max() <= 1
    change = first_step_of_second(pipeline, REQUESTS[0])
    for skipped in skips["video"]:
        # The first step of a transformer has nothing to reuse.
        assert skipped == [*range(max(1, warmup), change), *range(change + max(1, warmup), 6)]
    assert first_step_of_second(pipeline, REQUESTS[1]) not in skips["picture"][0]


@torch.inference_mode()
def first_step_of_second(pipeline: ToyPipeline, request: DiffusionRequest) -> int:
    state = pipeline.encode(request)
    while pipeline.transformer_index(state) == 0:
        state.step += 1
    return state.step


def test_captured_steps_draw_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capturer = Capturer()
    monkeypatch.setattr(Device, "capturer", lambda self: capturer)
    runner, pipeline = started(tmp_path)
    capturer.num_captures = capturer.num_replays = 0
    drive = Drive(runner).run({0: REQUESTS[:2]})
    assert not drive.errors
    check(drive.images, pipeline, REQUESTS[:2])
    # Both have 4 steps of the first transformer, one of them with one row of modulation; then one each of different
    # ones, and one of the second; then the picture alone has 2. A first run is eager, the second is captured.
    assert capturer.num_captures == 2
    assert capturer.num_replays == 2 + 1


def test_code_is_compiled_with_several_sequences_of_one_transformer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, pipeline = started(tmp_path)
    packs: list[list[float]] = []

    def watched(rows_of: Any, conditions: list[float]) -> Any:
        packs.append(conditions)
        return rows_of(conditions)

    for table in pipeline._modulations:
        monkeypatch.setattr(table, "rows_of", partial(watched, table.rows_of))
    with torch.inference_mode():
        run_variants(pipeline, pipeline.encode(make_request("compiled", num_inference_steps=3)), runner.ranks)
    assert [(len(conditions), len(set(conditions))) for conditions in packs] == [(1, 1), (2, 1), (2, 2)]
