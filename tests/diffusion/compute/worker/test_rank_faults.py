"""An error of one request on one rank, inside a common call of all ranks: the pictures of the others do not change."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from testbed.runner_driver import Drive, kept, make_request, psnr
from tests.diffusion.compute.distributed.ranks import run_places, run_ranks
from tests.diffusion.compute.worker.replica import merging, started
from vllm_omni.diffusion.compute.attention.sharded import ShardedAttention
from vllm_omni.diffusion.compute.coordination.ranks import Ranks, RanksLostError
from vllm_omni.diffusion.compute.distributed.groups import Group, GroupBrokenError
from vllm_omni.diffusion.compute.distributed.mesh import World
from vllm_omni.diffusion.compute.step.pipeline import RequestState
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.plan import ItemError, StepPlan
from vllm_omni.diffusion.messages.worker import RankInfo

REQUESTS = [
    make_request("a", negative_prompt="a blue car", seed=1, num_inference_steps=3),
    make_request("b", "a photo", height=32, width=48, seed=2, num_inference_steps=3),
    make_request("c", "blue", height=48, width=32, seed=3, num_inference_steps=2),
]
GUILTY_RANK = 1
LAYOUTS = {
    "ulysses": DiffusionParallelConfig(ulysses_degree=2),
    "ring": DiffusionParallelConfig(ring_degree=2),
    "cfg": DiffusionParallelConfig(cfg_parallel_size=2),
    "tensor": DiffusionParallelConfig(tensor_parallel_size=2),
}


def fail_at(runner: Any, stage: str, request_id: str, error: Exception) -> None:
    """Make `stage` raise on this rank whenever the request takes part in it."""
    pipeline = runner.pipeline
    if stage == "attention":  # half-way through a forward, and only once its sequence is there
        members, calls = list[str](), [0]

        def begin(ids: list[str]) -> None:
            members[:], calls[0] = ids, 0

        watch(pipeline, "predict", begin)
        attend = ShardedAttention.__call__

        def failing(attention: ShardedAttention, *qkv: torch.Tensor, **further: Any) -> torch.Tensor:
            calls[0] += 1
            if request_id in members and calls[0] == 2:
                raise error
            return attend(attention, *qkv, **further)

        ShardedAttention.__call__ = failing  # type: ignore[assignment,method-assign]  # in a process of its own
    else:

        def check(ids: list[str]) -> None:
            if request_id in ids:
                raise error

        watch(pipeline, stage, check)


def watch(pipeline: Any, stage: str, look: Callable[[list[str]], Any]) -> None:
    original = getattr(pipeline, stage)

    def watched(subject: Any, *rest: Any) -> Any:
        members = subject if isinstance(subject, list | tuple) else [subject]
        look([m.request.request_id if isinstance(m, RequestState) else m.request_id for m in members])
        return original(subject, *rest)

    setattr(pipeline, stage, watched)


def draw(
    rank_info: RankInfo, parallel: DiffusionParallelConfig, path: Path, stage: str | None, error: Exception
) -> tuple[dict[str, np.ndarray], dict[str, ItemError], int]:
    runner = started(rank_info, parallel, path)
    if stage and rank_info.rank == GUILTY_RANK % rank_info.replica_size:
        fail_at(runner, stage, "b", error)
    drive = Drive(runner, merge=merging(runner)).run({0: REQUESTS[:2], 1: REQUESTS[2:]})
    return drive.images, drive.errors, kept(runner)


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> dict[str, np.ndarray]:
    images: dict[str, np.ndarray]
    ((images, _, _),) = run_places(
        draw, DiffusionParallelConfig(), DiffusionParallelConfig(), tiny_model, None, RuntimeError()
    )
    return images


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from testbed.tiny_models import SMALL, build_tiny_qwen_image

    path = tmp_path_factory.mktemp("faults") / "model"
    return build_tiny_qwen_image(path, heads=4, default_sampling_params=SMALL)


@pytest.mark.parametrize(
    ("layout", "stage", "kind"),
    [
        ("ulysses", "predict", "out_of_memory"),
        ("ulysses", "attention", "out_of_memory"),
        ("ring", "attention", "internal"),
        ("cfg", "predict", "internal"),
        ("ulysses", "encode", "internal"),
        ("ulysses", "combine", "out_of_memory"),
        ("cfg", "advance", "internal"),
        ("ulysses", "decode", "internal"),
    ],
)
def test_an_error_on_one_rank_fails_one_request(
    tiny_model: Path, alone: dict[str, np.ndarray], layout: str, stage: str, kind: str
) -> None:
    error = torch.OutOfMemoryError("no room") if kind == "out_of_memory" else RuntimeError("poisoned")
    check(run_places(draw, LAYOUTS[layout], LAYOUTS[layout], tiny_model, stage, error), alone, kind)


@pytest.mark.parametrize("stage", ["encode", "attention"])
def test_an_error_under_tensor_parallelism_fails_one_request(four_heads: Path, stage: str) -> None:
    single = DiffusionParallelConfig()
    ((wanted, _, _),) = run_places(draw, single, single, four_heads, None, RuntimeError())
    error = RuntimeError("poisoned")
    check(run_places(draw, LAYOUTS["tensor"], LAYOUTS["tensor"], four_heads, stage, error), wanted, "internal")


def check(results: list[Any], wanted: dict[str, np.ndarray], kind: str) -> None:
    for images, errors, num_kept in results:
        assert set(images) == {"a", "c"}
        assert {i: e.kind for i, e in errors.items()} == {"b": kind}
        assert "fail" in errors["b"].traceback or "check" in errors["b"].traceback, "the guilty rank's own traceback"
        assert num_kept == 0
        for request_id, picture in images.items():
            assert psnr(picture, wanted[request_id]) >= 60


def draw_with_aborts(
    rank_info: RankInfo, parallel: DiffusionParallelConfig, path: Path, rounds: int
) -> list[dict[str, Any]]:
    """In each round an abort reaches the ranks before different steps."""
    runner = started(rank_info, parallel, path)
    pictures = []
    for number in range(rounds):
        dice = random.Random(number)
        heard = [dice.randrange(3) for _ in range(rank_info.replica_size)]

        def hear(step_id: int, branches: Any, heard: Any = heard) -> dict[str, list[int]]:
            if heard[rank_info.rank] == step_id:
                runner.abort(["b"])
            return {}

        merge, aborted = merging(runner), max(heard)

        def end(result: Any, merge: Any = merge, aborted: int = aborted) -> Any:
            merged = merge(result)
            if merged.step_id == aborted + 1:  # the engine has ended it meanwhile, and tells the workers
                merged.errors["b"] = ItemError("aborted", "aborted")
            return merged

        pictures.append(Drive(runner, hear, end).run({0: REQUESTS}).images)
    return pictures


def test_an_abort_may_reach_the_ranks_at_different_steps(tiny_model: Path, alone: dict[str, np.ndarray]) -> None:
    parallel = DiffusionParallelConfig(ulysses_degree=2, cfg_parallel_size=2)
    for rounds in run_places(draw_with_aborts, parallel, parallel, tiny_model, 8):
        for images in rounds:
            assert {"a", "c"} <= set(images)
            for request_id in ("a", "c"):
                assert psnr(images[request_id], alone[request_id]) >= 60


def lose(rank_info: RankInfo, parallel: DiffusionParallelConfig, path: Path) -> str:
    """Rank 1 fails in a step that rank 0 does not reach: both raise RanksLostError."""
    runner = started(rank_info, parallel, path)
    runner.execute(StepPlan(0, new_requests=[REQUESTS[0]], encode=["a"]))
    if rank_info.rank == GUILTY_RANK:
        fail_at(runner, "predict", "a", RuntimeError("poisoned"))
        try:
            runner.execute(StepPlan(1, denoise=["a"]))
        except RanksLostError as error:
            return type(error).__name__
    try:
        runner.ranks.num_attempts += 7
        runner.execute(StepPlan(1, denoise=["a"]))
    except RanksLostError as error:
        return type(error).__name__
    return "went on"


def test_ranks_in_different_steps_give_up(tiny_model: Path) -> None:
    parallel = DiffusionParallelConfig(ulysses_degree=2)
    assert run_places(lose, parallel, parallel, tiny_model) == ["RanksLostError"] * 2


def break_off(world: World, guilty: int | None, hindrance: str | None = None) -> str:
    """Break an exchange on every rank. guilty: this rank reports its own error. hindrance: prevents a reconnection."""
    if hindrance == "device":
        World.can_rebuild = property(lambda self: False)  # type: ignore[assignment,method-assign]  # in a process of its own
    elif hindrance == "connection":
        world.rebuild = Mock(side_effect=RuntimeError("connection refused"))  # type: ignore[method-assign]

    def run() -> None:
        raise ValueError("poisoned") if world.rank == guilty else GroupBrokenError("connection reset")

    try:
        Ranks(world).attempt(run)
    except Exception as error:
        return type(error).__name__
    return "went on"


def test_a_broken_exchange_without_a_failed_rank_ends_all_ranks() -> None:
    """No rank would report an error, and the request would never end."""
    parallel = DiffusionParallelConfig(ulysses_degree=2)
    assert run_ranks(break_off, parallel, None) == ["RanksLostError"] * 2
    assert run_ranks(break_off, parallel, 1) == ["PeerFailedError", "ValueError"]


@pytest.mark.parametrize("hindrance", ["device", "connection"])
def test_ranks_that_cannot_reconnect_give_up(hindrance: str) -> None:
    """A kernel on the device waits for the failed rank, or the new connection fails."""
    assert run_ranks(break_off, DiffusionParallelConfig(ulysses_degree=2), 1, hindrance) == ["RanksLostError"] * 2


def test_a_single_rank_exchanges_nothing() -> None:
    ranks = Ranks()
    assert ranks.unite([True, False]) == [True, False]
    assert ranks.agree(2.5) == 2.5
    assert ranks.take_sent_bytes() == {}
    with pytest.raises(ZeroDivisionError):
        ranks.attempt(lambda: 1 / 0)
    assert Group.alone().size == 1
