"""The engine on a fake worker. Waits are for events."""

from __future__ import annotations

import asyncio
import logging
import time

import numpy as np
import pytest

from testbed.fakes import FakeExecutor, FakeRunner, fake_image, make_config, make_ready, make_scheduled
from testbed.patience import GUARD_SECONDS
from tests.diffusion.control.engines import (
    NotedEvents,
    failures,
    iter_nowait,
    now_request,
    read_until_done,
    running_engine,
    until,
)
from vllm_omni.diffusion.control.engine import DiffusionEngine
from vllm_omni.diffusion.control.events import Failed, Finished, Preview, Started, StepDone
from vllm_omni.diffusion.messages.plan import ItemError, StepPlan, StepResult
from vllm_omni.errors import (
    ConfigError,
    GenerationError,
    InvalidRequestError,
    ModerationBlockedError,
    QueueFullError,
    RequestAbortedError,
    UnavailableError,
)


async def test_events_come_in_order_with_the_picture_and_timings() -> None:
    observer = NotedEvents()
    async with running_engine(observer=observer) as engine:
        arrival = time.monotonic() - 100  # it waited elsewhere first
        request = make_scheduled(steps=4, seed=5, preview_steps=(2, 3), arrival=arrival)
        events = await read_until_done(engine.add([request]))
    kinds = [(type(event), getattr(event, "step", None)) for event in events]
    assert kinds == [
        (Started, None),
        (StepDone, 1),
        (StepDone, 2),
        (Preview, 2),
        (StepDone, 3),
        (Preview, 3),
        (StepDone, 4),
        (Finished, None),
    ]
    previews = [event.image for event in events if isinstance(event, Preview)]
    assert all(
        np.array_equal(image, fake_image(request.request, step)) for image, step in zip(previews, (2, 3), strict=True)
    )
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert np.array_equal(finished.image, fake_image(request.request))
    timings = finished.timings
    assert 100 <= timings["queue"] < timings["total"]
    assert timings["text_encode"] == pytest.approx(0.001)
    assert timings["denoise"] == pytest.approx(4 * 0.002)
    assert timings["vae_decode"] == pytest.approx(0.003)
    assert (timings["computed_steps"], timings["cached_steps"]) == (4, 0)
    assert observer.outcomes == [("r", "completed")]


async def test_cached_steps_are_told_apart_and_counted_anew_by_a_replay() -> None:
    shares = {2: 0.5, 3: 1.0}

    def runner() -> FakeRunner:
        return FakeRunner(cached=lambda request_id, step: shares.get(step, 0.0))

    for die_at in ((), (3,)):
        async with running_engine(FakeExecutor(runner, die_at=die_at)) as engine:
            events = await read_until_done(engine.add([now_request(steps=4)]))
        finished = events[-1]
        assert isinstance(finished, Finished)
        assert (finished.timings["computed_steps"], finished.timings["cached_steps"]) == (2.5, 1.5)
        assert finished.timings["text_encode"] == pytest.approx(0.001)
        assert finished.timings["denoise"] == pytest.approx(4 * 0.002)


async def test_a_picture_decoded_in_tiles_says_so() -> None:
    class Tiling(FakeRunner):
        def execute(self, plan: StepPlan) -> StepResult:
            result = super().execute(plan)
            result.tiled = [i for i in plan.decode if i == "large"]
            return result

    async with running_engine(FakeExecutor(Tiling)) as engine:
        events = await read_until_done(engine.add([now_request("large", seed=1), now_request("small", seed=2)]), 2)
    said = {event.request_id: event.timings.get("vae_tiling") for event in events if isinstance(event, Finished)}
    assert said == {"large": True, "small": None}


async def test_several_requests_of_one_add() -> None:
    async with running_engine() as engine:
        requests = [now_request(f"r-{n}", (64, 64 + 16 * n), 3 + n, seed=n) for n in range(5)]
        events = await read_until_done(engine.add(requests), 5)
    pictures = {event.request_id: event.image for event in events if isinstance(event, Finished)}
    assert pictures.keys() == {request.request_id for request in requests}
    for request in requests:
        assert np.array_equal(pictures[request.request_id], fake_image(request.request))
        steps = [e.step for e in events if isinstance(e, StepDone) and e.request_id == request.request_id]
        assert steps == list(range(1, request.num_steps + 1))


async def test_the_next_plan_is_sent_before_the_result_of_the_last() -> None:
    executor = FakeExecutor(hold=True)
    async with running_engine(executor) as engine:
        events = engine.add([now_request(steps=3)])
        for number in range(5):  # encode, three steps, decode
            await until(lambda n=number: executor.num_plans == min(n + 2, 5))  # type: ignore[misc]
            assert len(executor.runner.plans) == number
            executor.release_results()
        await read_until_done(events)
    assert executor.max_in_flight == 2


async def test_what_arrives_early_in_a_step_is_in_the_next() -> None:
    """The second plan is sent only when the running step is nearly done."""
    slow = make_ready(seconds_per_unit=1.0)  # hours a step
    executor = FakeExecutor(lambda: FakeRunner(ready=slow), hold=True)
    async with running_engine(executor, max_queue_seconds=1e12) as engine:
        long = engine.add([now_request("long", 256, 50)])
        await until(lambda: executor.num_plans == 1)
        executor.release_results()
        await until(lambda: executor.num_plans == 2)
        short = engine.add([now_request("short", 64, 1)])
        for _ in range(100):
            await asyncio.sleep(0)
        assert executor.num_plans == 2
        for _ in range(3):
            executor.release_results()
            plans = executor.num_plans
            await until(lambda n=plans: executor.num_plans == n + 1)  # type: ignore[misc]
        executor.release_results()
        await read_until_done(short)
        assert executor.runner.plans[1].denoise == ["long"]
        assert [(p.encode, p.denoise, p.decode) for p in executor.runner.plans[2:]][:3] == [
            (["short"], [], []),
            ([], ["short"], []),
            ([], [], ["short"]),
        ]
        assert not [event for event in iter_nowait(long) if not isinstance(event, Started | StepDone)]


@pytest.mark.parametrize("num_results", range(6))
async def test_abort_in_each_phase(num_results: int) -> None:
    """Abort after `num_results` of: encode, three steps, decode. The other request is not affected."""
    executor, observer = FakeExecutor(hold=True), NotedEvents()
    async with running_engine(executor, observer) as engine:
        victim = engine.add([now_request("victim", steps=3)])
        for number in range(num_results):
            await until(lambda n=number: executor.num_plans > n)  # type: ignore[misc]
            executor.release_results()
        await until(lambda: len(observer.steps) == num_results and executor.num_plans > 0)
        neighbour = engine.add([now_request("neighbour", steps=3, seed=3)])
        engine.abort(["victim", "unknown"])
        events = iter_nowait(victim)
        if num_results == 5:
            assert isinstance(events[-1], Finished)
        else:
            assert failures(events) == {"victim": RequestAbortedError}
            assert executor.aborted == ["victim"]
        executor_done = asyncio.ensure_future(read_until_done(neighbour))
        while not executor_done.done():
            if executor.num_plans > len(executor.runner.plans):
                executor.release_results()
            await asyncio.sleep(0)
        last = executor_done.result()[-1]
        assert isinstance(last, Finished)
        assert np.array_equal(last.image, fake_image(make_scheduled(seed=3).request))
        while executor.num_plans > len(executor.runner.plans):
            executor.release_results()
        assert victim.empty()
        await until(lambda: engine.status().num_running == 0)
    if num_results < 5:
        assert observer.outcomes == [("victim", "aborted"), ("neighbour", "completed")]


async def test_one_failure_leaves_the_others_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    errors = {
        "bad": ItemError("weights are on fire", "internal", "Traceback"),
        "wrong": ItemError("no", "invalid", param="strength"),
    }
    runner = lambda: FakeRunner(errors=lambda id, phase, step: errors.get(id) if step == 2 else None)  # noqa: E731
    observer = NotedEvents()
    async with running_engine(FakeExecutor(runner), observer) as engine:
        events = await read_until_done(engine.add([now_request(id) for id in ("a", "bad", "b", "wrong")]), 4)
    assert failures(events) == {"bad": GenerationError, "wrong": InvalidRequestError}
    assert sorted(event.request_id for event in events if isinstance(event, Finished)) == ["a", "b"]
    assert [e.error.param for e in events if isinstance(e, Failed) and e.request_id == "wrong"] == ["strength"]
    assert "fire" not in next(str(e.error) for e in events if isinstance(e, Failed) and e.request_id == "bad")
    assert sorted(observer.outcomes) == [
        ("a", "completed"),
        ("b", "completed"),
        ("bad", "failed"),
        ("wrong", "refused"),
    ]
    assert observer.rejects == []  # whoever answers counts it, as every wrong request
    assert observer.reasons == {
        "a": "",
        "b": "",
        "bad": "the device failed on this request",
        "wrong": "wrong strength",
    }
    assert observer.added == ["a", "bad", "b", "wrong"]
    assert [r.getMessage() for r in caplog.records] == ["request bad failed (internal): weights are on fire\nTraceback"]


async def test_pictures_that_are_none_end_as_what_they_are(caplog: pytest.LogCaptureFixture) -> None:
    """A picture that is not finite fails at the decode or at a preview; the error names the cause."""
    overflowed = ItemError("float16 overflowed: use bfloat16 (--dtype bfloat16)", "not_finite")
    errors = {("late", "decode", 4): overflowed, ("early", "denoise", 2): overflowed}
    errors["blocked", "decode", 4] = ItemError("the safety checker blocked it", "blocked")
    runner = lambda: FakeRunner(errors=lambda *when: errors.get(when))  # noqa: E731
    observer = NotedEvents()
    async with running_engine(FakeExecutor(runner), observer) as engine:
        events = await read_until_done(engine.add([now_request(id) for id in ("a", "late", "early", "blocked")]), 4)
        await until(lambda: engine.status().num_running == 0)
    told = {event.request_id: event.error for event in events if isinstance(event, Failed)}
    assert {i: type(error) for i, error in told.items()} == {
        "late": GenerationError,
        "early": GenerationError,
        "blocked": ModerationBlockedError,
    }
    assert str(told["late"]) == str(told["early"]) == overflowed.message
    assert (told["blocked"].status, told["blocked"].code) == (400, "moderation_blocked")
    assert told["blocked"].type == "image_generation_user_error"
    logged = sorted(record.getMessage().split()[1] for record in caplog.records)
    assert logged == ["early", "late"]  # a blocked plan is no fault
    outcomes = [("a", "completed"), ("blocked", "refused"), ("early", "failed"), ("late", "failed")]
    assert sorted(observer.outcomes) == outcomes


@pytest.mark.parametrize("always", [False, True])
async def test_out_of_memory_is_tried_again_alone(always: bool) -> None:
    def errors(request_id: str, phase: str, step: int) -> ItemError | None:
        in_company = len(executor.runner.plans[-1].denoise) > 1
        hit = request_id == "b" and step == 2 and phase == "denoise" and (in_company or always)
        return ItemError("no room", "out_of_memory") if hit else None

    executor = FakeExecutor(lambda: FakeRunner(errors=errors))
    async with running_engine(executor) as engine:
        events = await read_until_done(engine.add([now_request(id, seed=1) for id in "abc"]), 3)
    assert failures(events) == ({"b": GenerationError} if always else {})
    steps = [event.step for event in events if isinstance(event, StepDone) and event.request_id == "b"]
    assert steps == ([1] if always else [1, 2, 3, 4])  # a step is told once
    assert [plan for plan in executor.runner.plans if "b" in plan.denoise][-1].denoise == ["b"]


async def test_a_full_queue_refuses_all_or_nothing() -> None:
    executor, observer = FakeExecutor(hold=True), NotedEvents()
    async with running_engine(executor, observer, max_num_queued_reqs=3) as engine:
        events = engine.add([now_request("a"), now_request("b", 256, 40)])
        with pytest.raises(QueueFullError) as full:
            engine.add([now_request("c"), now_request("d")])
        assert full.value.retry_after is not None
        assert 0 < full.value.retry_after < engine.status().queue_seconds
        assert observer.rejects == ["queue_full"]
        assert engine.status().num_waiting == 2
        with pytest.raises(InvalidRequestError):
            engine.add([now_request("a")])
        engine.add([now_request("c")])
        engine.abort(["a", "b", "c"])
        await read_until_done(events, 2)
        assert executor.aborted == []  # the worker never heard of them
        engine.add([now_request("d"), now_request("e")])
        assert engine.eta_seconds([now_request("f")]) > 0


async def test_what_no_worker_can_be_sent_is_refused_alone() -> None:
    async with running_engine() as engine:
        with pytest.raises(InvalidRequestError, match="cannot be sent to a worker"):
            engine.add([now_request("a"), now_request("b", sigmas=(np.float64(1.0),))])
        assert engine.status().num_waiting == 0
        await read_until_done(engine.add([now_request("a")]))


async def test_retry_after_while_draining_ends_with_the_drain() -> None:
    """`retry_after` is the rest of the drain plus the load time of a new server."""
    executor = FakeExecutor(lambda: FakeRunner(ready=make_ready(seconds_per_unit=1.0, load_seconds=7.0)), hold=True)
    async with running_engine(executor, max_queue_seconds=1e9) as engine:
        engine.add([now_request("a", 256, 40)])
        assert engine.status().queue_seconds > GUARD_SECONDS + 100
        drained = asyncio.create_task(engine.drain(GUARD_SECONDS))
        await until(lambda: engine.status().state == "draining")
        with pytest.raises(UnavailableError) as unavailable:
            engine.add([now_request("b")])
        assert 7.0 <= (unavailable.value.retry_after or 0.0) <= GUARD_SECONDS + 7.0
        engine.abort(["a"])
        assert await drained


async def test_drain_takes_no_new_work_and_finishes_the_old() -> None:
    executor, observer = FakeExecutor(), NotedEvents()
    async with running_engine(executor, observer) as engine:
        assert engine.status().state == "running"
        events = engine.add([now_request("a", steps=30), now_request("b", steps=3)])
        drained = asyncio.create_task(engine.drain(GUARD_SECONDS))
        await until(lambda: engine.status().state == "draining")
        with pytest.raises(UnavailableError) as unavailable:
            engine.add([now_request("c")])
        assert unavailable.value.retry_after is not None
        assert observer.rejects == ["unavailable"]
        assert await drained
        assert len(iter_nowait(events)) == 30 + 3 + 2 * len({Started, Finished})
        assert engine.status().num_running == engine.status().num_waiting == 0


async def test_drain_gives_up_in_time_and_close_fails_the_rest() -> None:
    executor = FakeExecutor(hold=True)
    async with running_engine(executor) as engine:
        events = engine.add([now_request()])
        assert not await engine.drain(0.01)
        await engine.close()
        assert failures(await read_until_done(events)) == {"r": UnavailableError}
        assert executor.closed
        assert (engine.status().state, engine.status().healthy) == ("stopped", False)
        with pytest.raises(UnavailableError):
            engine.add([now_request("late")])
        await engine.close()


async def test_no_work_before_start() -> None:
    engine = DiffusionEngine(make_config(), FakeExecutor())
    assert engine.status().state == "starting"
    with pytest.raises(UnavailableError):
        engine.add([now_request()])
    engine.abort(["r"])
    await engine.close()


async def test_a_start_that_fails_is_the_callers_to_hear() -> None:
    engine = DiffusionEngine(make_config(), FakeExecutor(start_errors={0: ConfigError("no such model")}))
    with pytest.raises(ConfigError):
        await engine.start()
    assert engine.status().state == "failed"
    await engine.close()


async def test_a_bug_in_the_loop_fails_everything_at_once() -> None:
    class Broken(NotedEvents):
        def on_step(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
            raise ZeroDivisionError("a bug")

    executor = FakeExecutor()
    async with running_engine(executor, Broken()) as engine:
        events = await read_until_done(engine.add([now_request("a"), now_request("b")]), 2)
        assert failures(events) == {"a": GenerationError, "b": GenerationError}
        assert engine.status().state == "failed"
        await until(lambda: executor.closed)
