"""Under every parallel layout a cache decides as in one process: whole runners on gloo ranks, random mixed batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from testbed.runner_driver import Drive, make_request, psnr
from tests.diffusion.compute.cache.driving import Skips, watch_skips
from tests.diffusion.compute.cache.settings import settings_of
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.worker.replica import merging, started
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.startup.model_start import CACHE_SHARE
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.plan import StepResult
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.diffusion.messages.worker import RankInfo

LAYOUTS = {
    "ulysses": DiffusionParallelConfig(ulysses_degree=2),
    "ring": DiffusionParallelConfig(ring_degree=2),
    "cfg": DiffusionParallelConfig(cfg_parallel_size=2),
    "tensor": DiffusionParallelConfig(tensor_parallel_size=2),
    "cfg x ulysses": DiffusionParallelConfig(cfg_parallel_size=2, ulysses_degree=2),
    "ring x tensor": DiffusionParallelConfig(ring_degree=2, tensor_parallel_size=2),
}
COMBINED = ("cfg x ulysses", "ring x tensor")
"""Layouts that together have every kind of parallelism."""
SEEDS = (0, 3)
"""Seeds of the random batches of every run; the layouts' run draws 200 others."""


def random_arrivals(seed: int) -> dict[int, list[DiffusionRequest]]:
    """Up to four requests of any size, steps and guidance, some of which opt out; they join when they like."""
    dice = random.Random(seed)
    arrivals: dict[int, list[DiffusionRequest]] = {0: []}
    for number in range(dice.randint(2, 4)):
        request = make_request(
            f"{seed}-{number}",
            dice.choice(["", "a photo", "apple " * 9]),
            negative_prompt=dice.choice([None, "", "a red car"]),
            height=dice.choice([16, 32, 48, 80]),
            width=dice.choice([16, 32, 64]),
            num_inference_steps=dice.randint(3, 12),
            seed=dice.randrange(2**32),
            cache=dice.random() > 0.15,
        )
        arrivals.setdefault(0 if number == 0 else dice.randrange(6), []).append(request)
    return arrivals


def in_turn(groups: int, step_id: int, branches: Mapping[str, int]) -> dict[str, list[int]]:
    """A request keeps its groups, whoever joins or leaves."""
    return {i: [(int(i.split("-")[1]) + branch) % groups for branch in range(n)] for i, n in branches.items()}


def swapped(groups: int, step_id: int, branches: Mapping[str, int]) -> dict[str, list[int]]:
    """Groups change at every step."""
    return {i: [(step_id + branch) % groups for branch in range(n)] for i, n in branches.items()}


Runs = list[tuple[dict[str, np.ndarray], Skips]]


def draw(
    place: RankInfo, parallel: DiffusionParallelConfig, path: Path, backend: str, seeds: Sequence[int], moving: bool
) -> Runs:
    """By seed the pictures and what this rank skipped."""
    runner = started(place, parallel, path, cache_backend=backend, cache_config=settings_of(backend))
    skips = watch_skips(runner)
    runs = []
    for seed in seeds:
        skips.clear()
        placed = partial(swapped if moving else in_turn, parallel.cfg_parallel_size)
        drive = Drive(runner, placed, merging(runner)).run(random_arrivals(seed))
        assert drive.errors == {}
        assert runner.pipeline.step_cache.budget.num_bytes == 0
        runs.append((drive.images, {i: [list(steps) for steps in branches] for i, branches in skips.items()}))
    return runs


def alone(path: Path, backend: str, seeds: Sequence[int]) -> Runs:
    one = DiffusionParallelConfig()
    (runs,) = run_places(draw, one, one, path, backend, seeds, False)
    return runs  # type: ignore[no-any-return]  # what `draw` returns


def check(path: Path, backend: str, layout: str, seeds: Sequence[int], wanted: Runs) -> int:
    parallel = LAYOUTS[layout]
    return compare(run_places(draw, parallel, parallel, path, backend, seeds, False), parallel, wanted)


def compare(by_rank: Sequence[Runs], parallel: DiffusionParallelConfig, wanted: Runs) -> int:
    """The steps that were skipped; every rank's pictures and the decisions of all are those of `wanted`."""
    num_skipped = 0
    for number, (pictures, skips) in enumerate(wanted):
        group_size = parallel.replica_size // parallel.cfg_parallel_size
        for first in range(0, parallel.replica_size, group_size):
            told = [by_rank[rank][number][1] for rank in range(first, first + group_size)]
            assert all(other == told[0] for other in told), "ranks of a group decide alike"
        groups = [by_rank[first][number][1] for first in range(0, parallel.replica_size, group_size)]
        for request_id, branches in skips.items():
            for branch, steps in enumerate(branches):
                assert sorted(step for group in groups for step in group[request_id][branch]) == steps
                num_skipped += len(steps)
        for runs in by_rank:
            for request_id, picture in pictures.items():
                assert psnr(runs[number][0][request_id], picture) >= 60
    return num_skipped


@pytest.fixture(scope="module")
def reference(calm_model: Path) -> Callable[[str], Runs]:
    """Runs of a step cache in one process, made once for all layouts."""
    return cache(lambda backend: alone(calm_model, backend, SEEDS))


@pytest.mark.parametrize(
    "layout",
    [*COMBINED, *(pytest.param(name, marks=pytest.mark.layouts) for name in LAYOUTS if name not in COMBINED)],
)
def test_a_layout_decides_as_one_process(
    calm_model: Path, reference: Callable[[str], Runs], backend: str, layout: str
) -> None:
    assert check(calm_model, backend, layout, SEEDS, reference(backend)) > 10


@pytest.mark.layouts
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_random_batches_end_and_decide_as_one_process(calm_model: Path, backend: str, layout: str) -> None:
    seeds = range(100, 300)
    assert check(calm_model, backend, layout, seeds, alone(calm_model, backend, seeds)) > 500


def test_a_sequence_that_moves_between_rank_groups_has_a_miss(calm_model: Path, backend: str) -> None:
    one, parallel = DiffusionParallelConfig(), LAYOUTS["cfg"]
    (plain,) = run_places(draw_uncached, one, one, calm_model, range(2))
    for runs in run_places(draw, parallel, parallel, calm_model, backend, range(2), True):
        for (pictures, skips), uncached in zip(runs, plain):
            assert not any(steps for branches in skips.values() for steps in branches)
            for request_id, picture in uncached.items():
                assert psnr(pictures[request_id], picture) >= 60


STATIC: dict[str, Any] = {"steps_computation_mask": [1, *[0] * 11], "steps_computation_policy": "static"}


def test_what_one_rank_has_no_room_for_is_a_miss_on_all(calm_model: Path, backend: str) -> None:
    check_one_room(calm_model, backend, settings_of(backend))


def test_a_static_mask_skips_no_step_that_one_rank_had_no_room_for(calm_model: Path) -> None:
    check_one_room(calm_model, "cache_dit", STATIC)


def check_one_room(path: Path, backend: str, config: dict[str, Any]) -> None:
    parallel = LAYOUTS["ulysses"]
    for skips in run_places(draw_with_one_room, parallel, parallel, path, backend, config):
        assert not any(steps for branches in skips.values() for steps in branches)


def draw_with_one_room(
    place: RankInfo, parallel: DiffusionParallelConfig, path: Path, backend: str, config: dict[str, Any]
) -> Skips:
    runner = started(place, parallel, path, cache_backend=backend, cache_config=config)
    if place.rank == 1:
        runner.pipeline.step_cache.budget.max_bytes = 0
    skips = watch_skips(runner)
    assert Drive(runner, merge=merging(runner)).run(random_arrivals(0)).errors == {}
    return dict(skips)


def test_ranks_decide_alike_where_one_of_them_has_less_room(calm_model: Path, backend: str) -> None:
    check_less_room(calm_model, backend, settings_of(backend))


def test_counters_outlive_what_one_rank_has_no_room_for(calm_model: Path) -> None:
    """A rank that counted the reused steps anew would reuse a step that the other one computes."""
    check_less_room(calm_model, "cache_dit", {**settings_of("cache_dit"), "max_cached_steps": 4})


def check_less_room(path: Path, backend: str, config: dict[str, Any]) -> None:
    parallel = LAYOUTS["ulysses"]
    first, second = run_places(draw_with_less_room, parallel, parallel, path, backend, config)
    assert first == second
    with_room, with_less = first
    assert 0 < with_less < with_room


def draw_with_less_room(
    place: RankInfo, parallel: DiffusionParallelConfig, path: Path, backend: str, config: dict[str, Any]
) -> list[int]:
    """Number of skipped steps with enough room on both ranks, then with a part of it on rank 1."""
    runner = started(place, parallel, path, cache_backend=backend, cache_config=config)
    skips, merge, budget = watch_skips(runner), merging(runner), runner.pipeline.step_cache.budget
    counts, held = [], [0]
    arrivals = {0: [make_request(i, "", negative_prompt="a car", num_inference_steps=12, seed=1) for i in "ab"]}

    def note(result: StepResult) -> StepResult:
        held.append(result.cache_bytes)
        return merge(result)

    for share in (1.0, 0.7):
        if place.rank == 1 and share < 1:
            budget.max_bytes = share * max(held)
        skips.clear()
        assert Drive(runner, merge=note).run(arrivals).errors == {}
        counts.append(sum(len(steps) for branches in skips.values() for steps in branches))
    return counts


def test_ranks_of_a_tensor_group_drop_alike(calm_model: Path) -> None:
    """Else their forecasts, and with them the hidden states that all of them hold, would differ."""
    one, tensor, room = DiffusionParallelConfig(), LAYOUTS["tensor"], 2**32
    ((_, all_kept),) = run_places(draw_with_memory, one, one, calm_model, [room])
    less = int(0.7 * max(all_kept) / CACHE_SHARE)
    ((wanted, wanted_kept),) = run_places(draw_with_memory, one, one, calm_model, [less])
    assert 0 < max(wanted_kept) < max(all_kept)
    for images, num_kept in run_places(draw_with_memory, tensor, tensor, calm_model, [room, less]):
        assert num_kept == wanted_kept
        assert min(psnr(images[i], wanted[i]) for i in wanted) >= 60


def draw_with_memory(
    place: RankInfo, parallel: DiffusionParallelConfig, path: Path, free: Sequence[int]
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Pictures, and the bytes that the step cache kept after each step. free: bytes on each rank after the warm-up."""
    Device.free_memory_bytes = lambda self: free[place.rank]  # type: ignore[method-assign]  # in a process of its own
    runner = started(place, parallel, path, cache_backend="cache_dit", cache_config=settings_of("cache_dit"))
    merge, num_kept = merging(runner), list[int]()

    def note(result: StepResult) -> StepResult:
        num_kept.append(result.cache_bytes)
        return merge(result)

    arrivals = {0: [make_request(i, "", negative_prompt="a car", num_inference_steps=12, seed=1) for i in "ab"]}
    return Drive(runner, merge=note).run(arrivals).images, num_kept


def test_a_reused_branch_is_told_once_whichever_ranks_reused_it(calm_model: Path) -> None:
    one, parallel = DiffusionParallelConfig(), LAYOUTS["cfg x ulysses"]
    (wanted,) = run_places(told_shares, one, one, calm_model)
    assert any(wanted.values()), "a cache that skips nothing proves nothing"
    for told in run_places(told_shares, parallel, parallel, calm_model):
        assert told == pytest.approx(wanted)


def told_shares(place: RankInfo, parallel: DiffusionParallelConfig, path: Path) -> dict[str, float]:
    """By request: how many steps the executor says came from the cache."""
    runner = started(place, parallel, path, cache_backend="cache_dit", cache_config=settings_of("cache_dit"))
    merge, told = merging(runner), dict[str, float]()

    def note(result: StepResult) -> StepResult:
        merged = merge(result)
        for request_id, share in merged.cached.items():
            told[request_id] = told.get(request_id, 0.0) + share
        return merged

    Drive(runner, partial(in_turn, parallel.cfg_parallel_size), note).run(random_arrivals(0))
    return told


def draw_uncached(
    place: RankInfo, parallel: DiffusionParallelConfig, path: Path, seeds: Sequence[int]
) -> list[dict[str, np.ndarray]]:
    runner = started(place, parallel, path)
    return [Drive(runner).run(random_arrivals(seed)).images for seed in seeds]
