"""A cached request decides and draws in company as alone; its stored tensors are freed with it and fit the budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch

from testbed.runner_driver import Drive, make_request, psnr
from tests.diffusion.compute.cache.driving import Skips, draw, started, watch_skips
from tests.diffusion.compute.cache.settings import settings_of
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.cache import create_step_cache
from vllm_omni.diffusion.compute.cache.base import CacheSlot
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.packing import Hidden, Pack
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import parse_cache_config
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult

LONG = make_request("long", negative_prompt="a blue car", num_inference_steps=16, seed=3, true_cfg_scale=3.0)
WIDE = make_request("wide", "a photo", height=48, width=96, num_inference_steps=12, seed=4)
SHORT = make_request("short", "", negative_prompt=" ", height=16, width=16, num_inference_steps=4, seed=5)
TALL = make_request("tall", "apple " * 20, height=80, width=48, num_inference_steps=9, seed=6)
OPTED_OUT = make_request("opted out", "blue", num_inference_steps=8, seed=7, cache=False)
ARRIVALS = {0: [LONG], 2: [WIDE, SHORT], 5: [TALL, OPTED_OUT]}
REQUESTS = [LONG, WIDE, SHORT, TALL, OPTED_OUT]


@pytest.fixture(scope="module")
def plain(calm_model: Path) -> Drive:
    """All requests without a cache."""
    drive, _ = draw(calm_model, "none", {}, ARRIVALS)
    return drive


def test_decisions_and_pictures_are_those_of_the_request_alone(calm_model: Path, backend: str) -> None:
    runner = started(calm_model, backend, settings_of(backend))
    skips = watch_skips(runner)
    together = Drive(runner).run(ARRIVALS)
    assert max(together.pack_sizes) == 7
    seen: Skips = {request_id: [list(steps) for steps in branches] for request_id, branches in skips.items()}
    skips.clear()
    alone = [Drive(runner).run({0: [request]}) for request in REQUESTS]

    assert seen == skips
    assert len(seen["long"][0]) > 3, "a cache that skips nothing proves nothing"
    assert seen["long"][0] != seen["wide"][0], "sequences of one pack must differ in their decisions"
    assert seen["opted out"] == [[]]
    for request, drive in zip(REQUESTS, alone):
        assert psnr(together.images[request.request_id], drive.images[request.request_id]) >= 60


def test_a_request_that_opts_out_is_drawn_as_without_a_cache(calm_model: Path, plain: Drive, backend: str) -> None:
    cached, _ = draw(calm_model, backend, settings_of(backend), ARRIVALS)
    assert psnr(cached.images["opted out"], plain.images["opted out"]) >= 60
    assert psnr(cached.images["long"], plain.images["long"]) < 60


def watched(runner: ModelRunner) -> tuple[Drive, list[StepResult]]:
    """A drive, and the list that it fills with the results of its steps."""
    results: list[StepResult] = []

    def note(result: StepResult) -> StepResult:
        results.append(result)
        return result

    return Drive(runner, merge=note), results


def test_results_tell_what_was_cached_and_what_is_kept(calm_model: Path, backend: str) -> None:
    runner = started(calm_model, backend, settings_of(backend))
    skips = watch_skips(runner)
    drive, results = watched(runner)
    drive.run(ARRIVALS)

    for request in REQUESTS:
        told = sum(result.cached.get(request.request_id, 0.0) for result in results)
        branches = skips[request.request_id]
        assert told == sum(map(len, branches)) / len(branches)
    assert all(set(result.cached) <= set(result.advanced) for result in results)
    assert max(result.cache_bytes for result in results) > 2 * 16 * 64 * 4
    assert results[-1].cache_bytes == runner.pipeline.step_cache.budget.num_bytes == 0


def test_an_ended_request_leaves_the_budget_where_its_state_lives_on(calm_model: Path, backend: str) -> None:
    """A traceback may hold the state on one rank alone; ranks with other budgets would drop other tensors."""
    runner = started(calm_model, backend, settings_of(backend))
    budget = runner.pipeline.step_cache.budget
    runner.execute(StepPlan(0, new_requests=[make_request("r")], encode=["r"]))
    state = runner.states["r"]
    runner.execute(StepPlan(1, denoise=["r"]))
    assert budget.num_bytes > 0
    runner.execute(StepPlan(2, release=["r"]))
    assert state.step == 1
    assert budget.num_bytes == 0


# Zeros are steps that may be reused, whatever has changed.
STATIC: dict[str, Any] = {
    "steps_computation_mask": [1, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1],
    "steps_computation_policy": "static",
}
MODES: dict[str, dict[str, Any]] = {
    "without TaylorSeer": {**settings_of("cache_dit"), "enable_taylorseer": False},
    "TaylorSeer of order 2": {**settings_of("cache_dit"), "taylorseer_order": 2},
    "static mask": STATIC,
}
"""Settings of cache_dit that store other tensors or decide in another way than `settings_of`."""
MARKED_MODES = [pytest.param(name, marks=() if name == "static mask" else pytest.mark.thorough) for name in MODES]


def test_what_does_not_fit_is_a_miss(calm_model: Path, plain: Drive, backend: str) -> None:
    check_misses(calm_model, plain, backend, settings_of(backend))


@pytest.mark.parametrize("name", MARKED_MODES)
def test_what_does_not_fit_is_a_miss_in_every_mode(calm_model: Path, plain: Drive, name: str) -> None:
    check_misses(calm_model, plain, "cache_dit", MODES[name])


def check_misses(path: Path, plain: Drive, cache: str, settings: dict[str, Any]) -> None:
    """With a budget of 100 bytes no step is skipped and nothing is stored."""
    runner = started(path, cache, settings)
    skips = watch_skips(runner)
    runner.pipeline.step_cache.budget.max_bytes = 100
    drive, results = watched(runner)
    drive.run(ARRIVALS)
    assert drive.errors == {}
    assert not any(steps for branches in skips.values() for steps in branches)
    assert max(result.cache_bytes for result in results) == 0
    for request in REQUESTS:
        assert psnr(drive.images[request.request_id], plain.images[request.request_id]) >= 60


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """All tensors in nested dataclasses and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def held_bytes(slots: Iterable[CacheSlot]) -> int:
    """Memory behind all tensors in the slots, counted without the caches' own `tensors`."""
    storages = [x.untyped_storage() for slot in slots for x in tensors_in(slot)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def watch_memory(runner: ModelRunner) -> list[int]:
    """Bytes held after each run of the blocks, while the last step's content is still stored."""
    cache, held, slots = runner.pipeline.step_cache, [], WeakSet[CacheSlot]()
    run, watch = cache.run, cache.budget.watch

    def noted(slot: CacheSlot) -> None:
        slots.add(slot)
        watch(slot)

    def watched(*args: Any) -> Hidden:
        output = run(*args)
        held.append(held_bytes(slots))
        assert held[-1] == cache.budget.num_bytes
        return output

    cache.run = watched  # type: ignore[assignment,method-assign]
    cache.budget.watch = noted  # type: ignore[method-assign]
    return held


def test_the_budget_bounds_the_memory_that_is_held(calm_model: Path, backend: str) -> None:
    check_budget(calm_model, backend, settings_of(backend))


@pytest.mark.parametrize("name", MARKED_MODES)
def test_the_budget_bounds_the_memory_that_is_held_in_every_mode(calm_model: Path, name: str) -> None:
    check_budget(calm_model, "cache_dit", MODES[name])


def check_budget(path: Path, cache: str, settings: dict[str, Any]) -> None:
    """With a share of the memory that the cache would use, it stores less, and never more than the share."""
    runner = started(path, cache, settings)
    skips, held = watch_skips(runner), watch_memory(runner)
    budget = runner.pipeline.step_cache.budget

    def run(max_bytes: float) -> tuple[Skips, int]:
        skips.clear()
        held.clear()
        budget.max_bytes = max_bytes
        assert Drive(runner).run({0: [LONG], 2: [WIDE]}).errors == {}
        return dict(skips), max(held)

    all_skips, most = run(math.inf)
    assert run(most) == (all_skips, most), "what fits is kept"
    for share in (0.6, 0.3):
        _, bounded = run(share * most)
        assert 0 < bounded <= share * most


def test_a_neighbour_that_fails_in_the_middle_of_a_step_changes_no_decision(calm_model: Path, backend: str) -> None:
    wanted, wanted_skips = draw(calm_model, backend, settings_of(backend), {0: [LONG, WIDE]})
    runner = started(calm_model, backend, settings_of(backend))
    skips = watch_skips(runner)
    project = runner.pipeline.transformer.project  # type: ignore[attr-defined]  # Qwen-Image's
    calls = 0

    def failing(hidden: Any, context: Any, *rest: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if context.pack.num_sequences > 2 and calls % 3 == 0:
            raise RuntimeError("poisoned")
        velocity: torch.Tensor = project(hidden, context, *rest)
        return velocity

    runner.pipeline.transformer.project = failing  # type: ignore[attr-defined]
    drive = Drive(runner).run({0: [LONG, WIDE]})

    assert calls > 20
    assert drive.errors == {}
    assert skips == wanted_skips
    for request_id, picture in wanted.images.items():
        assert psnr(drive.images[request_id], picture) >= 60


class CountingGroup(Group):
    """A group of one that counts what it would exchange."""

    def __init__(self) -> None:
        super().__init__((0,), 0, {})  # type: ignore[arg-type]  # nothing is sent
        self.shapes: list[tuple[int, ...]] = []

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape))
        return x


@pytest.mark.parametrize(
    ("cache", "more", "first", "last"),
    [("cache_dit", {"max_continuous_cached_steps": -1}, 2, 11), ("tea_cache", {}, 1, 10)],
)
def test_one_exchange_a_step_for_all_sequences_and_none_where_none_can_skip(
    calm_model: Path, cache: str, more: dict[str, Any], first: int, last: int
) -> None:
    runner = started(calm_model, cache, settings_of(cache) | more)
    group, config = CountingGroup(), parse_cache_config(cache, settings_of(cache) | more)
    info = load_model_info(str(calm_model))
    assert isinstance(info, PackedModelInfo)
    runner.pipeline.step_cache = create_step_cache(config, info, group)
    requests = [make_request(f"{i}", negative_prompt=" ", num_inference_steps=12, seed=i) for i in range(3)]
    drive = Drive(runner).run({0: requests})
    assert drive.errors == {}
    assert group.shapes == [(3, 6)] * (last + 1 - first), "changes, sizes and misses of six sequences"


def test_a_pack_of_those_that_go_on_is_made_once(calm_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = started(calm_model, "cache_dit", settings_of("cache_dit"))
    selected: list[tuple[Pack, tuple[int, ...]]] = []
    select = Pack.select

    def counted(self: Pack, members: Sequence[int]) -> Pack:
        selected.append((self, tuple(members)))
        return select(self, members)

    monkeypatch.setattr(Pack, "select", counted)
    Drive(runner).run({0: [LONG, WIDE, TALL]})
    assert selected
    assert len(selected) == len({(id(pack), members) for pack, members in selected})


def test_pictures_are_worth_comparing(plain: Drive) -> None:
    assert all(np.std(image) > 2 for image in plain.images.values())
