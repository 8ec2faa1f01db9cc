"""Videos decoded piece by piece through scheduler and runner: a toy transformer with Wan's VAE."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from testbed.runner_driver import QUICK, kept, make_request
from testbed.toy_video import ToyPipeline, ToyState, ToyTransformer, toy_info
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.worker.scheduled_replica import Replica, scheduled
from tests.diffusion.control.engines import NotedEvents, read_until_done
from vllm_omni.diffusion.compute.families.component_loader import ComponentLoader
from vllm_omni.diffusion.compute.families.wan.vae import WanDecoder
from vllm_omni.diffusion.compute.startup import model_start
from vllm_omni.diffusion.compute.step.pipeline import DecoderFeatures, Grid, Picture
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.control.engine import DiffusionEngine
from vllm_omni.diffusion.control.events import Finished, Frames
from vllm_omni.diffusion.control.executor.inline import InlineExecutor
from vllm_omni.diffusion.control.scheduled_request import RequestCost
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import DecodePiece, StepPlan, StepResult
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.diffusion.messages.worker import RankInfo

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE, ONE_RANK = RankInfo(), DiffusionParallelConfig()


def request(request_id: str, seed: int, num_frames: int, width: int = 32, **changes: Any) -> DiffusionRequest:
    settings = {"height": 32, "width": width, "num_frames": num_frames, "num_inference_steps": 2, "seed": seed}
    return make_request(request_id, **settings | changes)


REQUESTS = [request("long", 1, 9, 48), request("picture", 2, 1), request("short", 3, 5)]


class PaddedDecoder:
    """Wan's VAE with one channel, 4 values a token, for the toy's tokens of 3 values."""

    def __init__(self, decoder: WanDecoder) -> None:
        self._decoder = decoder

    def __call__(self, latents: Sequence[Tensor], grids: Sequence[Grid]) -> list[Picture]:
        return self._decoder([F.pad(tokens, (0, 1)) for tokens in latents], grids)

    def decode_next(self, latents: Tensor, grid: Grid, frames: range, features: DecoderFeatures) -> Picture | None:
        return self._decoder.decode_next(F.pad(latents, (0, 1)), grid, frames, features)


class VideoPipeline(ToyPipeline):
    @classmethod
    def build(cls, loader: ComponentLoader) -> VideoPipeline:
        torch.manual_seed(0)
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=1, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1], latents_std=[2.0]
        )
        vae.enable_tiling(32, 32, 16, 16)  # so that ranks which share a decode have several tiles
        decoder = WanDecoder(vae.eval().requires_grad_(False), True, loader.mesh.vae)
        return cls(loader, [ToyTransformer(), ToyTransformer()], PaddedDecoder(decoder), modulation_bytes=2**20)


def start(path: Path, place: RankInfo = ALONE, parallel: DiffusionParallelConfig = ONE_RANK) -> ModelRunner:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_start, "pipeline_class", lambda family: VideoPipeline)
        runner = ModelRunner(OmniDiffusionConfig(str(path), parallel=parallel), toy_info(path), place, QUICK)
        runner.start()
    return runner


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    return start(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def replica(runner: ModelRunner) -> Iterator[Replica]:
    replica = Replica(runner, ONE_RANK)
    yield replica
    assert kept(runner) == 0


@pytest.fixture(scope="module")
def whole(runner: ModelRunner) -> dict[str, np.ndarray]:
    """Pixels of each request alone, decoded in one call."""
    return {request.request_id: decoded_whole(runner, request) for request in REQUESTS}


@torch.inference_mode()
def decoded_whole(runner: ModelRunner, request: DiffusionRequest) -> np.ndarray:
    pipeline, state = runner.pipeline, runner.pipeline.encode(request)
    for _ in range(request.num_inference_steps):
        pipeline.advance(state, pipeline.predict([state])[0])
    pipeline.forget(state)
    (picture,) = pipeline.decode([request], [state.latents])
    pixels: np.ndarray = picture.pixels.numpy()
    return pixels


def assert_same(made: dict[str, np.ndarray], whole: dict[str, np.ndarray]) -> None:
    for request_id, pixels in made.items():
        assert pixels.shape == whole[request_id].shape
        assert np.abs(pixels.astype(int) - whole[request_id]).max() <= 1
        assert whole[request_id].std() > 5


def test_pieces_among_the_steps_of_others_are_the_whole_video(replica: Replica, whole: dict[str, np.ndarray]) -> None:
    replica.add(REQUESTS[:1])
    while not replica.frames:
        replica.step()
    replica.add(REQUESTS[1:])
    made = replica.run()
    assert made.keys() == whole.keys()
    assert_same(made, whole)
    assert [len(piece) for piece in replica.frames["long"]] == [1, 4, 4]
    assert any(plan.pieces and plan.encode for plan in replica.plans)


def test_an_abort_between_pieces_frees_the_features(replica: Replica, whole: dict[str, np.ndarray]) -> None:
    replica.add(REQUESTS)
    while not replica.frames:
        replica.step()
    assert replica.runner.states["long"].decoder_features
    replica.runner.abort(["long"])
    replica.scheduler.abort(["long"])
    made = replica.run()
    assert len(replica.frames["long"]) == 1
    del made["long"]
    assert_same(made, whole)


def test_features_are_freed_with_the_last_piece(replica: Replica) -> None:
    replica.add(REQUESTS[:1])
    held = []
    while replica.step():
        if replica.plans[-1].pieces:
            held.append(bool(replica.runner.states["long"].decoder_features))
    assert held == [True, True, False]


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_a_piece_that_is_not_finite_fails_its_request_alone(
    replica: Replica, whole: dict[str, np.ndarray], value: float
) -> None:
    undo = spoil(replica, "long", value)
    replica.add(REQUESTS)
    made = replica.run()
    undo()
    assert {i: error.kind for i, error in replica.errors.items()} == {"long": "not_finite"}
    # Latents are checked with the first piece; values that only the decoder cannot take show in their piece.
    assert len(replica.frames.get("long", [])) == (0 if np.isnan(value) else 2)
    assert made.keys() == {"picture", "short"}
    assert_same(made, whole)


def spoil(replica: Replica, request_id: str, value: float) -> Callable[[], None]:
    """Put `value` into the last latent frame after the last step of a request. Returns a call that ends this."""
    pipeline = replica.runner.pipeline
    advance = pipeline.advance

    def spoiling(state: ToyState, branches: Sequence[Tensor], previews: bool = False) -> Tensor | None:
        clean = advance(state, branches, previews)
        if state.request.request_id == request_id and state.step == state.request.num_inference_steps:
            state.latents = state.latents.clone()
            state.latents[-1] = value
        return clean

    pipeline.advance = spoiling  # type: ignore[method-assign]
    return lambda: delattr(pipeline, "advance")


@torch.inference_mode()
def test_a_preview_is_the_middle_latent_frame_alone(replica: Replica) -> None:
    long = replace(REQUESTS[0], num_inference_steps=3)
    replica.add([long, REQUESTS[1]], preview_steps=(1,))
    replica.run()
    pipeline: Any = replica.runner.pipeline
    for one in (long, REQUESTS[1]):
        state = pipeline.encode(one)
        clean = pipeline.advance(state, pipeline.predict([state])[0], previews=True)
        pipeline.forget(state)
        frames, rows, columns = state.grid
        middle = clean.view(frames, rows * columns, -1)[frames // 2]
        wanted = pipeline.decoder([middle], [(1, rows, columns)])[0].pixels.numpy()
        preview = replica.previews[one.request_id]
        assert preview.shape == (one.height, one.width, 3)
        assert np.abs(preview.astype(int) - wanted).max() <= 1


def run_on_rank(
    place: RankInfo, parallel: DiffusionParallelConfig, path: Path
) -> tuple[dict[str, np.ndarray], list[dict[str, DecodePiece]], set[str], int]:
    replica = Replica(start(path, place, parallel), parallel)
    replica.add([REQUESTS[0], replace(REQUESTS[0], request_id="second"), *REQUESTS[1:]])
    made = replica.run()
    return made, [dict(plan.pieces) for plan in replica.plans], replica.made_here, kept(replica.runner)


@pytest.mark.parametrize("shared_by", [1, 2])
def test_ranks_decode_videos_in_turn_or_together(tmp_path: Path, whole: dict[str, np.ndarray], shared_by: int) -> None:
    parallel = DiffusionParallelConfig(ulysses_degree=2, vae_patch_parallel_size=shared_by)
    first, second = run_places(run_on_rank, parallel, parallel, tmp_path)
    made, plans, of_first, num_kept = first
    assert (num_kept, plans) == (0, second[1])
    videos = {"long", "second", "short"}
    assert (of_first, second[2]) == ((videos - {"second"}, {"second"}) if shared_by == 1 else (videos, set()))
    assert made.keys() == {*whole, "second"}
    assert_same(made, whole | {"second": whole["long"]})


class DyingRunner(ModelRunner):
    """Dies once, before the second piece of a video."""

    has_died = False

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        if not DyingRunner.has_died and any(piece.first == 1 for piece in plan.pieces.values()):
            DyingRunner.has_died = True
            raise RuntimeError("told to die")
        return super().launch(plan)


async def test_a_death_between_pieces_repeats_no_frame(
    tmp_path: Path, whole: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_start, "pipeline_class", lambda family: VideoPipeline)
    monkeypatch.setattr(DyingRunner, "has_died", False)
    config, info = OmniDiffusionConfig(str(tmp_path)), toy_info(tmp_path)
    observer = NotedEvents()
    executor = InlineExecutor(lambda: DyingRunner(config, info, options=QUICK))
    engine = DiffusionEngine(config, executor, observer, restart_backoff_seconds=0.001)
    await engine.start()
    try:
        # So long a decode that each piece has one latent frame.
        cost = RequestCost(1.0, 10.0, 1e9, (10,))
        requests = [replace(scheduled(one, arrival=time.monotonic()), cost=cost) for one in REQUESTS]
        events = await read_until_done(engine.add(requests), len(requests))
    finally:
        await engine.close()
    assert len(observer.restarts) == 1
    finished = {event.request_id: event.image for event in events if isinstance(event, Finished)}
    assert finished.keys() == whole.keys()
    assert_same(finished, whole)
    for request_id, starts in (("long", [0, 1, 5]), ("short", [0, 1])):
        frames = [event for event in events if isinstance(event, Frames) and event.request_id == request_id]
        assert [event.first for event in frames] == starts
        assert np.array_equal(np.concatenate([event.pixels for event in frames]), finished[request_id])
