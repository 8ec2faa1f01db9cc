"""Encodes of conditioning videos, which are cut into pieces: plans of the scheduler, and events of the engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from testbed.fakes import (
    SECONDS_PER_UNIT,
    FakeExecutor,
    FakeRunner,
    fake_checkpoint,
    fake_video,
    make_ready,
    make_scheduled,
)
from tests.diffusion.control.engines import NotedEvents, now_request, read_until_done, running_engine, until
from tests.diffusion.control.running import run_ahead, run_one, runner_that_lacks_memory_once
from tests.diffusion.control.simulation import PER_TOKEN, Simulation, step_work, total_work
from tests.diffusion.control.simulation import make_scheduler as make_simulated
from tests.diffusion.control.test_resident_adapters import loras, slow
from tests.diffusion.control.test_video_decodes import PIECE_UNITS, STEPS, make_scheduler, pieces_of, plans_until_done
from vllm_omni.diffusion.control.events import EncodeAdvanced, Failed, Finished, Started, StepDone
from vllm_omni.diffusion.control.scheduled_request import RequestCost, ScheduledRequest
from vllm_omni.diffusion.control.scheduler import Scheduler
from vllm_omni.diffusion.messages.plan import StepPlan
from vllm_omni.inputs.images import InputImage
from vllm_omni.jobs import Job

LATENT_FRAMES = 5
TEXT_UNITS = 10.0


def picture(value: int) -> InputImage:
    pixels = np.full((16, 16, 3), value, np.uint8)
    return InputImage.of(pixels, pixels)


def animation(request_id: str = "video", frames_per_piece: float = 1.0, **values: Any) -> ScheduledRequest:
    """A video of five latent frames from a picture, which encodes and decodes so many of them in a piece."""
    count = values.pop("num_latent_frames", LATENT_FRAMES)
    units = count * PIECE_UNITS / frames_per_piece
    cost = RequestCost(TEXT_UNITS + units, step=500.0, decode=units, branch_tokens=(500,), encode_video=units)
    fields = {"cost": cost, "images": (picture(1),), "num_frames": 4 * count - 3}
    return now_request(request_id, 16, STEPS, num_latent_frames=count, num_encoded_frames=count, **fields | values)


def encodes_of(plans: Sequence[StepPlan], request_id: str = "video") -> list[tuple[int, int]]:
    return [(p.first, p.end) for plan in plans if (p := plan.encode_pieces.get(request_id)) is not None]


@pytest.mark.parametrize(
    ("frames_per_piece", "pieces"),
    [
        (0.3, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),  # at least one
        (2.5, [(0, 2), (2, 4), (4, 5)]),
        (9.0, []),  # encoded whole
    ],
)
def test_a_piece_takes_as_long_as_one_of_a_decode(frames_per_piece: float, pieces: list[tuple[int, int]]) -> None:
    scheduler = make_scheduler()
    request = animation(frames_per_piece=frames_per_piece)
    scheduler.add([request])
    plans = plans_until_done(scheduler)
    assert encodes_of(plans) == pieces
    assert [plan.encode for plan in plans if plan.encode] == [["video"]] * max(1, len(pieces))
    assert [plan.new_requests for plan in plans if plan.new_requests] == [[request.request]]


def test_texts_and_pictures_are_encoded_whole() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_scheduled("text", 64, 2, num_frames=17, num_latent_frames=5), make_scheduled("picture", 64, 2)])
    plans = plans_until_done(scheduler)
    assert sorted(id for plan in plans for id in plan.encode) == ["picture", "text"]
    assert not any(plan.encode_pieces for plan in plans)


@pytest.mark.parametrize("policy", ["fair", "fcfs"])
def test_steps_of_a_short_request_run_between_the_pieces(policy: str) -> None:
    scheduler, runner = make_scheduler(scheduling_policy=policy), FakeRunner()
    scheduler.add([animation(num_latent_frames=9)])
    while not encodes_of(runner.plans):
        run_one(scheduler, runner)
    scheduler.add([make_scheduled("short", 64, 2)])
    run_one(scheduler, runner)
    run_one(scheduler, runner)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 0)
    plans = plans_until_done(scheduler, runner)
    items = [item for plan in plans for item in items_of(plan) if not item.startswith("video: d")]
    assert (
        items
        == {
            # Its work is less, so it goes first; its items share no plan with a piece.
            "fair": ["video: 0", "short: encode", "short: step", "short: step", "short: decode"]
            + [f"video: {n}" for n in range(1, 9)],
            # The video goes first, and the short request takes part beside it; its decode goes before all.
            "fcfs": ["video: 0", "video: 1", "short: encode", "video: 2", "short: step", "video: 3", "short: step"]
            + ["short: decode"]
            + [f"video: {n}" for n in range(4, 9)],
        }[policy]
    )
    assert runner.num_states == 0


def items_of(plan: StepPlan) -> list[str]:
    """Items of a plan in the worker's order, pieces of an encode by the number of their first latent frame."""
    encodes = {id: str(piece.first) for id, piece in plan.encode_pieces.items()}
    return [
        *(f"{id}: {encodes.get(id, 'encode')}" for id in plan.encode),
        *(f"{id}: {'denoise' if id == 'video' else 'step'}" for id in plan.denoise),
        *(f"{id}: decode" for id in plan.decode),
    ]


def test_remaining_work_counts_latent_frames_of_the_encode() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    request = animation()
    scheduler.add([request])
    overhead = make_ready().step_overhead_seconds / SECONDS_PER_UNIT
    rest = STEPS * (500.0 + overhead) + LATENT_FRAMES * PIECE_UNITS
    seen = [scheduler.queue_seconds / scheduler.seconds_per_unit]
    for _ in range(LATENT_FRAMES):
        run_one(scheduler, runner)
        seen.append(scheduler.queue_seconds / scheduler.seconds_per_unit)
    left = [rest + n * PIECE_UNITS for n in range(LATENT_FRAMES, -1, -1)]
    assert seen == pytest.approx([left[0] + TEXT_UNITS, *left[1:]])
    assert request.cost.total(STEPS) == pytest.approx(left[0] + TEXT_UNITS - STEPS * overhead)


def test_a_plan_encodes_one_video_for_all_requests_that_begin_with_it() -> None:
    scheduler, runner = make_scheduler(max_batch_tokens=100_000, scheduling_policy="fcfs"), FakeRunner()
    outputs = [animation(f"a{n}") for n in range(3)]
    scheduler.add([*outputs, animation("b", images=(picture(2),)), animation("longer", num_latent_frames=9)])
    plans = [plan for plan in plans_until_done(scheduler, runner) if plan.encode_pieces]
    assert {frozenset(plan.encode_pieces) for plan in plans} == {
        frozenset({"a0", "a1", "a2"}),
        frozenset({"b"}),
        frozenset({"longer"}),
    }
    assert encodes_of(plans, "b") == [(n, n + 1) for n in range(LATENT_FRAMES)]
    firsts = [next(iter(plan.encode_pieces)) for plan in plans]
    assert firsts == sorted(firsts, key=["a0", "b", "longer"].index), "one encode after the other: each holds memory"


def test_an_abort_takes_effect_between_two_pieces() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    scheduler.add([animation()])
    while len(encodes_of(runner.plans)) < 2:
        run_one(scheduler, runner)
    assert scheduler.num_running == 1
    assert not scheduler.request_checkpoint("video"), "nothing is denoised"
    assert scheduler.abort(["video"]) == {"video": True}
    plan = run_one(scheduler, runner)
    assert (plan.release, plan.encode) == (["video"], [])
    assert (runner.num_states, scheduler.queue_seconds) == (0, 0)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_piece_without_memory_in_company_begins_the_encode_again_alone(depth: int) -> None:
    scheduler, runner = make_scheduler(scheduling_policy="fcfs"), runner_that_lacks_memory_once("encode", first=2)
    scheduler.add([animation(), make_scheduled("long", 64, 30)])
    assert sorted(run_ahead(scheduler, runner, depth)) == ["long", "video"]
    firsts = [first for first, _ in encodes_of(runner.plans)]
    assert firsts[: firsts.index(2) + 1] == [0, 1, 2]
    assert firsts[-LATENT_FRAMES:] == [0, 1, 2, 3, 4]


def test_a_resumed_request_encodes_its_pictures_again() -> None:
    request = animation()
    scheduler, runner = make_scheduler(), FakeRunner()
    scheduler.add([replace(request, resume=fake_checkpoint(request.request, 1))])
    plans = plans_until_done(scheduler, runner)
    assert encodes_of(plans) == [(n, n + 1) for n in range(LATENT_FRAMES)]
    assert [list(plan.resume) for plan in plans if plan.encode] == [["video"], *[[]] * (LATENT_FRAMES - 1)]
    assert sum(bool(plan.denoise) for plan in plans) == STEPS - 1


def test_random_animations_among_short_requests_end_with_all_work_done() -> None:
    for seed in range(8):
        rng = random.Random(seed)
        arrivals: list[tuple[float, ScheduledRequest]] = []
        for n in range(12):
            request = make_scheduled(f"r{n}", rng.choice([64, 128]), rng.choice([1, 4]))
            if rng.random() < 0.5:
                frames = rng.choice([2, 5, 9])
                units = frames * 0.25 / PER_TOKEN / rng.choice([0.5, 2, 4])
                cost = RequestCost(20.0 + units, 60.0, units, (60,), encode_video=units)
                images = (picture(rng.randrange(3)),)
                request = make_scheduled(
                    f"r{n}", 16, 2, cost=cost, images=images, num_frames=4 * frames - 3, num_latent_frames=frames,
                    num_encoded_frames=frames, priority=rng.choice([0, 0, -1]),
                )  # fmt: skip
            arrivals.append((rng.uniform(0, 3), request))
        policy = rng.choice(["fair", "fcfs"])
        scheduler: Scheduler = make_simulated(rng.choice([300, 3000]), scheduling_policy=policy)
        simulation = Simulation(scheduler, arrivals, depth=rng.choice([1, 2]))
        work = sum(step_work(plan, simulation.requests) for plan in simulation.steps())
        assert work == pytest.approx(sum(map(total_work, simulation.requests.values())))
        assert simulation.finished.keys() == simulation.requests.keys()
        assert simulation.runner.num_states == scheduler.num_running == scheduler.queue_seconds == 0
        for plan in simulation.plans:
            assert len({simulation.requests[id].conditioning_video for id in plan.encode_pieces}) <= 1


# Engine ---------------------------------------------------------------------------------------------------------------


async def test_pieces_are_progress_and_their_seconds_add_up() -> None:
    request = animation()
    async with running_engine() as engine:
        events = await read_until_done(engine.add([request]))
    job = Job("job", "a red apple", "np", [request])
    begun = [event for event in events if isinstance(event, Started | EncodeAdvanced | StepDone)]
    shares = [0.2, 0.4, 0.6, 0.8, 1.0][: LATENT_FRAMES - 1]
    assert begun == [
        Started("video"),
        *(EncodeAdvanced("video", share) for share in (*shares, 1.0)),
        StepDone("video", 1),
        StepDone("video", 2),
    ]
    assert [job.progress(event).encoded_share for event in begun] == [0.0, *shares, 1.0, 0.0, 0.0]
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert np.array_equal(finished.image, fake_video(request.request))
    assert finished.timings["text_encode"] == pytest.approx(LATENT_FRAMES * 0.001)


async def test_an_aborted_encode_goes_no_further() -> None:
    executor = FakeExecutor(hold=True)
    async with running_engine(executor) as engine:
        events = engine.add([animation()])
        await until(lambda: bool(executor.pending))
        executor.release_results()
        await until(lambda: bool(executor.pending))
        engine.abort(["video"])
        executor.hold = False
        executor.release_results(len(executor.pending))
        (*_, failed) = await read_until_done(events)
        assert isinstance(failed, Failed)
        await until(lambda: executor.runner.num_states == 0)
        assert len(encodes_of(executor.runner.plans)) < LATENT_FRAMES


async def test_the_text_is_encoded_while_an_adapter_is_read_and_the_pieces_follow() -> None:
    executor = slow()
    async with running_engine(executor) as engine:
        events = engine.add([animation(loras=loras("a"))])
        await until(lambda: any(plan.encode_early for plan in executor.runner.plans))
        assert not any(plan.encode for plan in executor.runner.plans)
        executor.runner.finish("a")  # type: ignore[attr-defined]
        (*_, finished) = await read_until_done(events)
        assert isinstance(finished, Finished)
        plans = executor.runner.plans
        assert [request.request_id for plan in plans for request in plan.encode_early] == ["video"]
        assert encodes_of(plans) == [(n, n + 1) for n in range(LATENT_FRAMES)]


def test_a_text_that_was_encoded_early_costs_nothing_again() -> None:
    entry = make_scheduler()._new_entry(animation())
    whole = entry.remaining
    assert entry.early_encode().work == TEXT_UNITS
    entry.advance(entry.early_encode())
    assert entry.remaining == pytest.approx(whole - TEXT_UNITS)
    assert entry.next_item().work == pytest.approx(PIECE_UNITS)


@pytest.mark.parametrize("plan_number", [1, 3, 5, 6])
async def test_a_death_at_any_plan_encodes_again(plan_number: int) -> None:
    requests = [animation("a", seed=1), animation("b", images=(picture(2),), frames_per_piece=2, seed=2)]
    observer = NotedEvents()
    async with running_engine(FakeExecutor(die_at={plan_number}), observer) as engine:
        events = await read_until_done(engine.add(requests), 2)
    assert observer.restarts
    for request in requests:
        mine = [event for event in events if event.request_id == request.request_id]
        shares = [event.share for event in mine if isinstance(event, EncodeAdvanced)]
        assert shares == sorted(set(shares)), "no share twice"
        assert shares[-1] == 1.0
        finished = mine[-1]
        assert isinstance(finished, Finished)
        assert np.array_equal(finished.image, fake_video(request.request))
        assert len(pieces_of([plan for plan, _ in observer.steps], request.request_id)) > 1
