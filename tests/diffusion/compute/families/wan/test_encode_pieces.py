"""Conditioning videos of Wan that are encoded piece by piece, among items of other requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from testbed.runner_driver import Drive, fitted, kept
from testbed.tiny_wan import build_tiny_wan
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.families.wan import test_videos
from tests.diffusion.compute.families.wan.test_videos import SMALL, pictures_of, started
from tests.diffusion.compute.worker import replica as replicas
from tests.diffusion.compute.worker.scheduled_replica import Replica
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.families.wan.vae import WanEncoder
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.plan import EncodePiece, StepPlan
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.diffusion.messages.worker import RankInfo

pytestmark = pytest.mark.usefixtures("module_on_one_thread")

ONE_RANK = DiffusionParallelConfig()


def request(path: Path, kind: str, request_id: str, num_pictures: int = 1, **changes: Any) -> DiffusionRequest:
    fields = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 24}
    made = test_videos.request(request_id, "a red apple", **fields | pictures_of(path, kind, num_pictures) | changes)
    return fitted(made, load_model_info(str(path)))


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    path = build_tiny_wan(tmp_path_factory.mktemp("wan") / "model", "i2v-a14b", default_sampling_params=SMALL)
    return started(path)


@pytest.fixture
def replica(runner: ModelRunner) -> Iterator[Replica]:
    forget_pictures(runner)
    yield Replica(runner, ONE_RANK)
    assert (kept(runner), len(encodes(runner))) == (0, 0)


def forget_pictures(runner: ModelRunner) -> None:
    pipeline: Any = runner.pipeline
    pipeline._given_tokens._entries.clear()
    pipeline._given_tokens.num_bytes = 0


def encodes(runner: ModelRunner) -> list[Any]:
    """Encodes that are under way: private, but what they keep shows nowhere else."""
    pipeline: Any = runner.pipeline
    return list(pipeline._encodings.values())


def requests_of(runner: ModelRunner) -> list[DiffusionRequest]:
    path = runner._info.path
    return [
        request(path, "i2v-a14b", "long", seed=1),
        request(path, "i2v-a14b", "ends", 2, seed=2, num_frames=5, num_inference_steps=3),
    ]


@torch.inference_mode()
def test_pieces_among_the_steps_of_others_are_the_whole_encode(
    runner: ModelRunner, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of(runner)
    whole = {one.request_id: Drive(runner).run({0: [one]}).images[one.request_id] for one in requests}
    pipeline: Any = runner.pipeline
    given = {one.request_id: pipeline.encode(one).given for one in requests}
    forget_pictures(runner)
    monkeypatch.setattr(WanEncoder, "encode_next", counted := Counted(WanEncoder.encode_next))
    replica.add([requests[0]])
    replica.step()
    replica.add([requests[1], replace(requests[0], request_id="same", seed=3)])
    seen: dict[str, Any] = {}
    while replica.step():
        states: dict[str, Any] = dict(runner.states)
        seen |= {i: state.given for i, state in states.items() if state.step == 1}
    made = replica.run()
    assert replica.errors == {}
    for request_id, wanted in given.items():
        assert torch.equal(seen[request_id], wanted)
        assert np.abs(made[request_id].astype(int) - whole[request_id]).max() <= 1
        assert wanted.std() > 0.02
    assert "same" in made
    plans = [{i: (p.first, p.end) for i, p in plan.encode_pieces.items()} for plan in replica.plans]
    assert [plan["long"] for plan in plans if "long" in plan] == [(0, 1), (1, 2), (2, 3)]
    assert counted.num_calls == 3 + 2, "requests with the same pictures share their encode"
    assert any(plan.encode_pieces and plan.denoise for plan in replica.plans)


def test_an_abort_between_pieces_frees_the_features(runner: ModelRunner, replica: Replica) -> None:
    long, ends = requests_of(runner)
    replica.add([long, ends])
    replica.step()
    replica.step()
    assert [encode.feature_bytes > 0 for encode in encodes(runner)] == [True]
    runner.abort(["long"])
    replica.scheduler.abort(["long"])
    replica.step()
    assert not any(encode.num_latent_frames == 3 for encode in encodes(runner))
    assert replica.run().keys() == {"ends"}


def test_a_piece_that_fails_fails_its_request_alone(
    runner: ModelRunner, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WanEncoder, "encode_next", counted := Counted(WanEncoder.encode_next, fails_at=2))
    long, ends = requests_of(runner)
    replica.add([long, ends])
    assert replica.run().keys() == {"ends"}
    assert {i: error.message for i, error in replica.errors.items()} == {"long": "poisoned"}
    assert counted.num_calls == 2 + 2


def test_a_piece_that_was_sent_before_the_failure_of_another_is_skipped(
    runner: ModelRunner, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WanEncoder, "encode_next", counted := Counted(WanEncoder.encode_next, fails_at=1))
    (long, _) = requests_of(runner)
    first, second = ({"long": EncodePiece(n, n + 1)} for n in (0, 1))
    result = runner.execute(StepPlan(0, new_requests=[long], encode=["long"], encode_pieces=first))
    assert result.errors.keys() == {"long"}
    assert runner.execute(StepPlan(1, encode=["long"], encode_pieces=second)).errors == {}
    runner.execute(StepPlan(2, release=["long"]))
    assert counted.num_calls == 1


class Counted:
    """A method that counts its calls, and raises at one of them."""

    def __init__(self, method: Callable[..., Any], fails_at: int | None = None) -> None:
        self._method = method
        self._fails_at = fails_at
        self.num_calls = 0

    def __get__(self, owner: Any, cls: type[Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.num_calls += 1
            if self.num_calls == self._fails_at:
                raise RuntimeError("poisoned")
            return self._method(owner, *arguments)

        return call


def run_on_rank(
    place: RankInfo, parallel: DiffusionParallelConfig, path: Path, guilty: int | None
) -> tuple[dict[str, np.ndarray], dict[str, str], int]:
    runner = replicas.started(place, parallel, path)
    if place.rank == guilty:
        WanEncoder.encode_next = Counted(WanEncoder.encode_next, fails_at=2)  # type: ignore[method-assign, assignment]
    replica = Replica(runner, parallel)
    replica.add(requests_of(runner))
    made = replica.run()
    return made, {i: error.message for i, error in replica.errors.items()}, kept(runner) + len(encodes(runner))


@pytest.mark.layouts
@pytest.mark.parametrize(
    ("layout", "guilty"),
    [
        ({"ulysses_degree": 2}, None),
        ({"ulysses_degree": 2}, 1),
        ({"tensor_parallel_size": 2, "text_encoder_tp_size": 2}, 0),
        ({"cfg_parallel_size": 2}, 1),
    ],
)
def test_ranks_encode_the_same_pieces_and_skip_the_rest_of_one_that_failed(
    tmp_path: Path, layout: dict[str, int], guilty: int | None
) -> None:
    parallel = DiffusionParallelConfig(**layout)
    path = build_tiny_wan(tmp_path / "model", "i2v-a14b", heads=4, default_sampling_params=SMALL)
    runner = started(path)
    whole = {one.request_id: Drive(runner).run({0: [one]}).images[one.request_id] for one in requests_of(runner)}
    for made, errors, num_kept in run_places(run_on_rank, parallel, parallel, path, guilty):
        assert errors == ({} if guilty is None else {"long": "poisoned"})
        assert made.keys() == whole.keys() - errors.keys()
        for request_id, pixels in made.items():
            assert np.abs(pixels.astype(int) - whole[request_id]).max() <= 1
        assert num_kept == 0


@pytest.mark.thorough
def test_pieces_beside_clip_draw_what_a_whole_encode_draws(tmp_path: Path) -> None:
    path = build_tiny_wan(tmp_path / "model", "flf2v-2.1", default_sampling_params=SMALL)
    one = request(path, "flf2v-2.1", "one", 2, max_sequence_length=512, seed=4)
    runner = started(path)
    (whole,) = Drive(runner).run({0: [one]}).images.values()
    forget_pictures(runner)
    replica = Replica(runner, ONE_RANK)
    replica.add([one])
    (made,) = replica.run().values()
    assert sum(len(plan.encode_pieces) for plan in replica.plans) == 3
    assert np.abs(made.astype(int) - whole).max() <= 1
    assert (kept(runner), len(encodes(runner))) == (0, 0)
