"""Checkpoints of the scheduler and the engine: when they are taken, and what begins again from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from testbed.fakes import (
    SECONDS_PER_UNIT,
    FakeExecutor,
    FakeRunner,
    fake_checkpoint,
    fake_image,
    fake_video,
    make_config,
    make_ready,
    make_scheduled,
)
from tests.diffusion.control.builders import INFO, WHOLE
from tests.diffusion.control.engines import NotedEvents, now_request, read_until_done, running_engine, until
from tests.diffusion.control.running import run_one, run_out
from vllm_omni.diffusion.control.events import Checkpointed, EngineEvent, Finished, Frames, Preview, Started, StepDone
from vllm_omni.diffusion.control.resuming import with_checkpoints
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.control.scheduler import Scheduler
from vllm_omni.diffusion.messages.checkpoint import LATENTS, Checkpoint
from vllm_omni.diffusion.messages.plan import ItemError, StepPlan
from vllm_omni.errors import InvalidRequestError

OVERHEAD = make_ready().step_overhead_seconds


def step_seconds(request: ScheduledRequest) -> float:
    """Seconds of a step of this request alone, at the rate of the start."""
    return request.cost.step * SECONDS_PER_UNIT + OVERHEAD


def run_all(scheduler: Scheduler, runner: FakeRunner) -> list[StepPlan]:
    """Run until nothing is left, at the rate of the start; the plans."""
    while plan := scheduler.schedule():
        scheduler.update(runner.execute(plan), scheduler.plan_seconds)
    return runner.plans


def saved_steps(plans: Iterable[StepPlan], request_id: str = "r") -> list[int]:
    """Steps after which plans take a checkpoint of the request."""
    steps, saved = 0, []
    for plan in plans:
        steps += request_id in plan.denoise
        if request_id in plan.checkpoint:
            saved.append(steps)
    return saved


def of(events: Iterable[EngineEvent], kind: type[Any], request_id: str = "r") -> list[Any]:
    return [event for event in events if isinstance(event, kind) and event.request_id == request_id]


def video(request_id: str = "r", **values: Any) -> ScheduledRequest:
    """A video of 5 latent frames, each of which is a piece of the decode."""
    values = {"num_frames": 17, "num_latent_frames": 5, "steps": 4, "negative_prompt": None} | values
    made = make_scheduled(request_id, **values)
    return replace(made, cost=replace(made.cost, decode=5 * 3000.0))


# When -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_follows_each_interval_of_a_requests_own_steps() -> None:
    request = make_scheduled(steps=12)
    interval = 3 * step_seconds(request) - OVERHEAD / 2
    scheduler = Scheduler(make_config(), make_ready())
    scheduler.add([replace(request, checkpoint_seconds=interval)])
    assert saved_steps(run_all(scheduler, FakeRunner())) == [3, 6, 9, 12]


def test_a_request_without_an_interval_and_a_short_one_give_none() -> None:
    long, short = make_scheduled("long", steps=30), make_scheduled("short", steps=4)
    scheduler = Scheduler(make_config(), make_ready())
    scheduler.add([long, replace(short, checkpoint_seconds=30.0)])
    assert not any(plan.checkpoint for plan in run_all(scheduler, FakeRunner()))


def test_time_that_a_request_waits_does_not_count() -> None:
    waiting = make_scheduled("waiting", steps=4, priority=1)
    waiting = replace(waiting, checkpoint_seconds=8 * step_seconds(waiting))
    scheduler, runner = Scheduler(make_config(max_num_seqs=1), make_ready()), FakeRunner()
    scheduler.add([waiting])
    for _ in range(3):  # its encode and two steps
        run_one(scheduler, runner)
    scheduler.add([make_scheduled("ahead", steps=30)])
    assert not any(plan.checkpoint for plan in run_all(scheduler, runner))


def test_a_long_decode_gets_a_checkpoint_after_the_last_step() -> None:
    request = video()
    decode_seconds = 5 * request.frame_cost * SECONDS_PER_UNIT
    scheduler = Scheduler(make_config(), make_ready())
    scheduler.add([replace(request, checkpoint_seconds=0.9 * decode_seconds)])
    assert saved_steps(run_all(scheduler, FakeRunner())) == [4]


# On demand --------------------------------------------------------------------------------------------------


def test_a_plan_takes_an_asked_checkpoint_without_advancing_the_request() -> None:
    scheduler, runner = Scheduler(make_config(), make_ready()), FakeRunner()
    scheduler.add([make_scheduled("a", steps=4), make_scheduled("b", steps=4)])
    for _ in range(3):
        run_one(scheduler, runner)
    assert scheduler.request_checkpoint("a")
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.denoise, plan.checkpoint) == (["b"], ["a"])
    update = scheduler.update(runner.execute(plan), 0.01)
    (checkpoint,) = update.checkpoints.values()
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert not scheduler.request_checkpoint("a"), "it has made no step since"
    assert scheduler.newest_checkpoint("a") is checkpoint
    assert sorted(run_out(scheduler, runner)) == ["a", "b"]


def test_a_request_alone_is_saved_by_a_plan_without_items() -> None:
    scheduler, runner = Scheduler(make_config(), make_ready()), FakeRunner()
    scheduler.add([make_scheduled(steps=4)])
    for _ in range(2):
        run_one(scheduler, runner)
    in_flight = scheduler.schedule()
    assert in_flight is not None
    assert scheduler.request_checkpoint("r")
    behind = scheduler.schedule()
    assert behind is not None
    assert (behind.denoise, behind.checkpoint) == ([], ["r"])
    scheduler.update(runner.execute(in_flight), 0.01)
    (checkpoint,) = scheduler.update(runner.execute(behind), 0.0).checkpoints.values()
    assert checkpoint is not None
    assert checkpoint.step == 2, "the step that ran is in it"
    assert run_out(scheduler, runner) == ["r"]


def test_a_request_that_waits_between_steps_is_saved() -> None:
    scheduler, runner = Scheduler(make_config(max_num_seqs=1), make_ready()), FakeRunner()
    scheduler.add([make_scheduled("paused", steps=4)])
    for _ in range(3):
        run_one(scheduler, runner)
    scheduler.add([make_scheduled("ahead", steps=2, priority=-1)])
    run_one(scheduler, runner)
    assert scheduler.request_checkpoint("paused")
    plan = run_one(scheduler, runner)
    assert (plan.denoise, plan.checkpoint) == (["ahead"], ["paused"])
    newest = scheduler.newest_checkpoint("paused")
    assert newest is not None
    assert newest.step == 2


@pytest.mark.parametrize("num_plans", [0, 1])
def test_nothing_is_saved_before_the_first_step(num_plans: int) -> None:
    scheduler, runner = Scheduler(make_config(), make_ready()), FakeRunner()
    scheduler.add([make_scheduled()])
    for _ in range(num_plans):
        run_one(scheduler, runner)
    assert not scheduler.request_checkpoint("r")
    assert scheduler.newest_checkpoint("r") is None


def test_a_video_in_its_decode_is_saved_after_its_last_step() -> None:
    scheduler, runner = Scheduler(make_config(), make_ready()), FakeRunner()
    scheduler.add([video()])
    for _ in range(1 + 4 + 2):
        run_one(scheduler, runner)
    assert scheduler.request_checkpoint("r")
    plan = run_one(scheduler, runner)
    assert (plan.decode, plan.checkpoint) == ([], ["r"])
    newest = scheduler.newest_checkpoint("r")
    assert newest is not None
    assert newest.step == 4
    assert run_out(scheduler, runner) == ["r"], "the decode goes on with its next piece"


def test_a_request_that_ends_before_the_plan_is_not_saved() -> None:
    scheduler, runner = Scheduler(make_config(), make_ready()), FakeRunner()
    scheduler.add([make_scheduled("r", steps=2), make_scheduled("other", steps=4)])
    for _ in range(2):
        run_one(scheduler, runner)
    assert scheduler.request_checkpoint("r")
    scheduler.abort(["r"])
    assert not run_one(scheduler, runner).checkpoint


def test_values_that_are_not_finite_fail_the_request_alone() -> None:
    scheduler, runner = Scheduler(make_config(), make_ready()), FakeRunner()
    scheduler.add([make_scheduled("a", steps=4), make_scheduled("b", steps=4)])
    for _ in range(2):
        run_one(scheduler, runner)
    scheduler.request_checkpoint("a")
    plan = scheduler.schedule()
    assert plan is not None
    result = runner.execute(plan)
    result.checkpoints.clear()
    result.errors["a"] = ItemError("NaN", "not_finite")
    update = scheduler.update(result, 0.01)
    assert (list(update.failed), update.checkpoints) == (["a"], {})
    assert run_out(scheduler, runner) == ["b"]


# Resumed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_resumed_request_runs_and_costs_its_remaining_steps_alone(step: int) -> None:
    request = make_scheduled(steps=4)
    resumed = replace(request, resume=fake_checkpoint(request.request, step))
    scheduler, runner = Scheduler(make_config(), make_ready()), FakeRunner()
    whole = scheduler.eta_seconds([request])
    assert whole - scheduler.eta_seconds([resumed]) == pytest.approx(step * step_seconds(request))
    scheduler.add([resumed])
    plans = run_all(scheduler, runner)
    assert [len(plan.denoise) for plan in plans].count(1) == 4 - step
    assert not scheduler.num_running


@pytest.mark.parametrize("die_at", range(7, 14))
async def test_a_workers_death_repeats_only_the_steps_since_the_newest_checkpoint(die_at: int) -> None:
    request = now_request(steps=12, num_frames=1, seed=3)
    request = replace(request, checkpoint_seconds=2.5 * step_seconds(request), preview_steps=(2, 5, 11))
    executor, observer = FakeExecutor(die_at={die_at}), NotedEvents()
    async with running_engine(executor, observer) as engine:
        events = await read_until_done(engine.add([request]))
    assert observer.restarts == [1]
    assert [event.step for event in of(events, StepDone)] == [*range(1, 13)]
    assert [event.step for event in of(events, Preview)] == [2, 5, 11]
    assert len(of(events, Started)) == 1
    (finished,) = of(events, Finished)
    assert np.array_equal(finished.image, fake_image(request.request))
    resumed = [plan.resume["r"].step for plan, _ in observer.steps if "r" in plan.resume]
    assert len(resumed) == 1, "it did not begin again from its first step"
    assert {*resumed} <= {event.checkpoint.step for event in of(events, Checkpointed)}
    assert finished.timings["computed_steps"] == 12, "steps before the checkpoint count, and lost ones do not"


async def test_frames_that_were_delivered_do_not_come_again_after_a_death_in_the_decode() -> None:
    request = replace(video(seed=2), checkpoint_seconds=0.001)
    executor, observer = FakeExecutor(die_at={1 + 4 + 3}), NotedEvents()
    async with running_engine(executor, observer) as engine:
        events = await read_until_done(engine.add([request]))
    assert observer.restarts == [1]
    frames = of(events, Frames)
    assert [event.first for event in frames] == [0, 1, 5, 9, 13]
    assert np.array_equal(np.concatenate([event.pixels for event in frames]), fake_video(request.request))
    assert sum(bool(plan.denoise) for plan, _ in observer.steps) == 4, "no step ran twice"


async def test_out_of_memory_beside_others_begins_again_alone_from_the_checkpoint() -> None:
    failed: list[int] = []

    def errors(request_id: str, phase: str, step: int) -> ItemError | None:
        if request_id == "r" and step == 6 and not failed:
            failed.append(step)
            return ItemError("full", "out_of_memory")
        return None

    request = now_request("r", steps=8)
    request = replace(request, checkpoint_seconds=step_seconds(request) / 2)
    observer = NotedEvents()
    async with running_engine(FakeExecutor(lambda: FakeRunner(errors=errors)), observer) as engine:
        events = await read_until_done(engine.add([request, now_request("other", steps=8)]), 2)
    assert failed
    resumed = [plan.resume["r"].step for plan, _ in observer.steps if "r" in plan.resume]
    assert resumed == [5]
    assert [event.step for event in of(events, StepDone)] == [*range(1, 9)]


async def test_the_engine_answers_each_request_for_a_checkpoint() -> None:
    executor = FakeExecutor(hold=True)
    async with running_engine(executor) as engine:
        events = engine.add([now_request(steps=9)])
        engine.request_checkpoint(["r", "unknown"])
        assert events.get_nowait() == Checkpointed("r", None), "nothing has run"
        await until(lambda: len(executor.pending) > 0)
        executor.release_results(1)
        await until(lambda: any("r" in plan.denoise for plan in executor.pending))
        engine.request_checkpoint(["r"])
        executor.hold = False
        executor.release_results(len(executor.pending))
        seen = await read_until_done(events)
    (answer,) = of(seen, Checkpointed)
    assert answer.checkpoint.step in (1, 2)


async def test_a_death_answers_who_waits_for_a_checkpoint_with_the_newest() -> None:
    executor = FakeExecutor(hold=True)
    async with running_engine(executor) as engine:
        events = engine.add([now_request(steps=9)])
        await until(lambda: len(executor.pending) > 0)
        executor.release_results(1)
        await until(lambda: any("r" in plan.denoise for plan in executor.pending))
        engine.request_checkpoint(["r"])
        executor.hold = False
        executor.die()
        seen = await read_until_done(events)
    assert of(seen, Checkpointed) == [Checkpointed("r", None)]


async def test_the_observer_gets_the_bytes_of_each_checkpoint() -> None:
    sizes: list[tuple[str, int]] = []

    class Sizes(NotedEvents):
        def on_checkpoint(self, request: Any, num_bytes: int, seconds: float) -> None:
            assert seconds >= 0
            sizes.append((request.request_id, num_bytes))

    request = now_request(steps=4)
    request = replace(request, checkpoint_seconds=step_seconds(request) / 2)
    async with running_engine(observer=Sizes()) as engine:
        events = await read_until_done(engine.add([request]))
    checkpoints = of(events, Checkpointed)
    assert sizes == [("r", event.checkpoint.num_bytes) for event in checkpoints]
    assert [event.checkpoint.step for event in checkpoints] == [1, 2, 3, 4]
    assert sizes[0][1] == 4 * 16 * 4


async def test_a_drained_request_goes_on_elsewhere() -> None:
    """Two engines, as two servers: the first is asked for a checkpoint and gives the request up."""
    request = now_request(steps=9, seed=4)
    executor = FakeExecutor(step_seconds=0.001)
    async with running_engine(executor) as engine:
        events = engine.add([request])
        while not isinstance(event := await events.get(), StepDone) or event.step < 3:
            pass
        engine.request_checkpoint(["r"])
        while not isinstance(event := await events.get(), Checkpointed):
            pass
        engine.abort(["r"])
    assert event.checkpoint is not None
    observer = NotedEvents()
    async with running_engine(observer=observer) as engine:
        seen = await read_until_done(engine.add([replace(request, resume=event.checkpoint)]))
    assert [e.step for e in of(seen, StepDone)] == [*range(event.checkpoint.step + 1, 10)]
    (finished,) = of(seen, Finished)
    assert np.array_equal(finished.image, fake_image(request.request))


# Refused ----------------------------------------------------------------------------------------------------


def bad(**changes: Any) -> Checkpoint:
    return replace(fake_checkpoint(make_scheduled().request, 2), **changes)


NAN = np.full((4, 16), np.nan, np.float32)
BFLOAT16_INFINITY = np.full((4, 16), 0x7F80, np.int16)


@pytest.mark.parametrize(
    ("checkpoint", "fault"),
    [
        (bad(step=0), "step 0"),
        (bad(step=5), "steps 1 to 4"),
        (bad(step="2"), "step '2'"),
        (bad(values={"seed": object()}), "values of a wrong type"),
        (bad(arrays={LATENTS: [1.0]}), "latents of type list"),
        (bad(arrays={}, dtypes={}), "latents"),
        (bad(dtypes={}), "different names"),
        (bad(dtypes={LATENTS: "float64"}), "float64"),
        (bad(dtypes={LATENTS: "bfloat16"}), "stored as float32"),
        (bad(arrays={LATENTS: NAN}), "NaN"),
        (bad(arrays={LATENTS: BFLOAT16_INFINITY}, dtypes={LATENTS: "bfloat16"}), "NaN"),
        (bad(arrays={LATENTS: NAN, "../x": NAN}, dtypes={LATENTS: "float32", "../x": "float32"}), "NaN|named"),
    ],
)
def test_a_checkpoint_that_no_such_request_has_written_is_refused(checkpoint: Checkpoint, fault: str) -> None:
    with pytest.raises(InvalidRequestError, match=fault) as error:
        with_checkpoints([make_scheduled(steps=4)], INFO, checkpoint, None)
    assert error.value.param == "resume"


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), "30", True])
def test_an_interval_that_is_not_a_positive_number_is_refused(seconds: Any) -> None:
    with pytest.raises(InvalidRequestError, match="checkpoint_seconds takes"):
        with_checkpoints([make_scheduled()], INFO, None, seconds)


def test_only_a_checkpoint_can_be_resumed() -> None:
    wrong: Any = b"bytes"
    with pytest.raises(InvalidRequestError, match=r"resume takes a Checkpoint or None, got b'bytes'"):
        with_checkpoints([make_scheduled()], INFO, wrong, None)


def test_several_outputs_do_not_resume_from_one_checkpoint() -> None:
    with pytest.raises(InvalidRequestError, match="one output, got 2"):
        with_checkpoints([make_scheduled("a"), make_scheduled("b")], INFO, bad(), None)


def test_a_whole_pipeline_cannot_resume_and_gives_no_checkpoints() -> None:
    with pytest.raises(InvalidRequestError, match="whole pipeline"):
        with_checkpoints([make_scheduled()], WHOLE, bad(), None)
    (request,) = with_checkpoints([make_scheduled(steps=9)], WHOLE, None, 1e-6)
    scheduler, runner = Scheduler(make_config(), make_ready()), FakeRunner()
    scheduler.add([request])
    for _ in range(4):
        run_one(scheduler, runner)
    assert not scheduler.request_checkpoint("r")
    assert not any(plan.checkpoint for plan in run_all(scheduler, runner))
