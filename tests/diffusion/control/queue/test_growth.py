"""The event loop serves everybody, so nothing that runs on it may take time in proportion to the queue."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from testbed.fakes import FakeExecutor, FakeRunner, fake_image, make_config, make_ready, make_scheduled
from tests.diffusion.control.engines import NotedEvents, now_request, until
from tests.diffusion.control.test_replicas import engines_of, running
from tests.operations import counting_operations
from vllm_omni.diffusion.control.events import Preview
from vllm_omni.diffusion.control.replicas import Replicas
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.control.scheduler import Scheduler
from vllm_omni.entrypoints.openai.metrics import PrometheusObserver
from vllm_omni.errors import QueueFullError, UnavailableError
from vllm_omni.jobs import Job

FEW, MANY = 100, 10_000


class Growth:
    """Numbers of operations of each call, with a short and with a long queue."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        with counting_operations() as operations:
            yield
        self._counts.setdefault(name, []).append(operations.number)

    def check(self) -> None:
        assert self._counts
        for name, (few, many) in self._counts.items():
            # log MANY is twice log FEW, and paths in a tree differ; a look at each request is a hundred times as much.
            assert 0 < many <= 5 * few, f"{name}: {few} operations with {FEW} requests, {many} with {MANY}"


def mixed_requests(prefix: str, count: int) -> list[ScheduledRequest]:
    return [make_scheduled(f"{prefix}{n}", (64, 96, 256)[n % 3], 3 + 7919 * n % 40) for n in range(count)]


def refused(call: Callable[[], object]) -> None:
    with pytest.raises((QueueFullError, UnavailableError)):
        call()


@pytest.mark.parametrize("policy", ["fair", "fcfs"])
def test_calls_of_the_scheduler(policy: str) -> None:
    growth = Growth()
    for length in (FEW, MANY):
        config = make_config(max_num_queued_reqs=length, max_queue_seconds=math.inf, scheduling_policy=policy)
        scheduler, runner = Scheduler(config, make_ready()), FakeRunner()
        scheduler.add(mixed_requests("r", length - 2))
        with growth.measured("add"):
            scheduler.add([make_scheduled("new", 96, 20)])
        for when in ("", " beside a running plan"):
            with growth.measured("refusal" + when):
                refused(partial(scheduler.add, mixed_requests("late", 5)))
            with growth.measured("status" + when):
                assert scheduler.num_running + scheduler.num_waiting == length - 1
                assert scheduler.queue_seconds > 0
            with growth.measured("ETA" + when):
                scheduler.eta_seconds([make_scheduled("other", 96, 20)])
            with growth.measured("schedule" + when):
                plan = scheduler.schedule()
            assert plan is not None
            result = runner.execute(plan)
            with growth.measured("update" + when):
                scheduler.update(result, 0.01)
        with growth.measured("twenty steps"):
            for _ in range(20):
                plan = scheduler.schedule()
                assert plan is not None
                scheduler.update(runner.execute(plan), 0.01)
        with growth.measured("add one before all others"):
            scheduler.add([make_scheduled("urgent", 96, 20, priority=-1)])
        with growth.measured("schedule one before all others"):
            plan = scheduler.schedule()
        assert plan is not None
        assert plan.encode[0] == "urgent"
        with growth.measured("abort of one that runs"):
            assert scheduler.abort(["urgent"]) == {"urgent": True}
        with growth.measured("abort of one that waits"):
            assert scheduler.abort(["new"]) == {"new": False}
        with growth.measured("reset after a death"):
            assert len(scheduler.reset().replayed) < FEW
    growth.check()


def test_a_step_of_which_most_of_the_queue_may_be_no_part() -> None:
    """The search for requests that fit beside the first does not visit those that do not fit."""
    growth = Growth()
    for length in (FEW, MANY):
        config = make_config(max_num_queued_reqs=length, max_queue_seconds=math.inf, scheduling_policy="fcfs")
        scheduler, runner = Scheduler(config, make_ready(max_batch_tokens=160)), FakeRunner()
        scheduler.add([make_scheduled("first", 64, 30)])
        scheduler.add([make_scheduled(f"large{n}", 256, 30) for n in range(length - 2)])
        scheduler.add([make_scheduled("last", 64, 30)])
        with growth.measured("schedule"):
            for _ in range(5):
                plan = scheduler.schedule()
                assert plan is not None
                scheduler.update(runner.execute(plan), 0.01)
        assert plan is not None
        assert plan.denoise == ["first", "last"]
    growth.check()


@pytest.mark.thorough
async def test_calls_of_replicas_and_a_step_of_their_engines() -> None:
    growth = Growth()
    for length in (FEW, MANY):
        executors, observer = [FakeExecutor(hold=True), FakeExecutor(hold=True)], NotedEvents()
        settings = {"max_num_queued_reqs": length, "max_queue_seconds": math.inf}
        async with running(executors, observer, **settings) as replicas:
            first, second = engines_of(replicas)
            first.add(mixed_requests("a", length // 2))
            second.add(mixed_requests("b", length // 2 - 1))
            await until(lambda both=executors: all(one.num_plans == 2 for one in both))  # type: ignore[misc]
            with growth.measured("step"):
                executors[0].release_results()
                await until(lambda seen=observer.steps: len(seen) == 1)  # type: ignore[misc]
            measure_calls(growth, replicas)
    growth.check()


def measure_calls(growth: Growth, replicas: Replicas) -> None:
    """Measure every call of `replicas`, which have room for exactly one more request."""
    metrics = PrometheusObserver("demo")
    metrics.watch(replicas.status)
    with growth.measured("add"):
        replicas.add([now_request("new", 96, 20)])
    with growth.measured("refusal"):
        refused(partial(replicas.add, [now_request("late"), now_request("later")]))
    with growth.measured("status"):
        assert replicas.status().num_waiting > 0
    with growth.measured("metrics"):
        metrics.render()
    with growth.measured("ETA"):
        replicas.eta_seconds([now_request("other", 96, 20)])
    with growth.measured("abort"):
        replicas.abort(["new"])
    replicas.begin_drain()
    with growth.measured("refusal while draining"):
        refused(partial(replicas.add, [now_request("last")]))


def test_events_of_a_job_with_many_pictures() -> None:
    growth = Growth()
    for length in (FEW, MANY):
        job = Job("job", "x", "np", mixed_requests("job-", length))
        with growth.measured("is_done"):
            assert not job.is_done
        with growth.measured("progress"):
            output = job.progress(Preview(f"job-{length - 1}", 1, fake_image(job.requests[-1].request)))
        assert output.index == length - 1
    growth.check()
