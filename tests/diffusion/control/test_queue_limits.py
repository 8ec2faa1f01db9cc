"""Limits of the queue, and estimates of times."""

from __future__ import annotations

import random

import pytest

from testbed.fakes import FakeRunner, make_scheduled
from tests.diffusion.control.running import run_one
from tests.diffusion.control.simulation import (
    PER_TOKEN,
    items_of,
    make_scheduler,
    step_seconds,
    step_work,
    total_work,
)
from vllm_omni.errors import InvalidRequestError, QueueFullError


def test_a_full_queue_says_when_to_come_back() -> None:
    scheduler = make_scheduler(max_num_queued_reqs=3)
    scheduler.add([make_scheduled("a", 64, 4), make_scheduled("b", 64, 10), make_scheduled("c", 256, 50)])
    with pytest.raises(QueueFullError) as full:
        scheduler.add([make_scheduled("d", 64, 4)])
    shortest = PER_TOKEN * total_work(make_scheduled("a", 64, 4))
    assert full.value.retry_after == pytest.approx(shortest)
    with pytest.raises(QueueFullError) as full:
        scheduler.add([make_scheduled("d", 64, 4), make_scheduled("e", 64, 4)])
    assert full.value.retry_after == pytest.approx(shortest + PER_TOKEN * total_work(make_scheduled("b", 64, 10)))
    scheduler.abort(["b"])
    scheduler.add([make_scheduled("d", 64, 4)])


def test_nobody_is_told_to_wait_longer_than_for_an_empty_queue() -> None:
    """An empty queue accepts a request with more work than its limit."""
    scheduler = make_scheduler(max_queue_seconds=1.0)
    scheduler.add([make_scheduled("small", 64, 1)])
    with pytest.raises(QueueFullError) as full:
        scheduler.add([make_scheduled("big", 256, 100)])
    assert full.value.retry_after == pytest.approx(scheduler.queue_seconds)


def test_what_is_planned_to_its_end_makes_room_first() -> None:
    """A request whose last item is planned leaves the queue first, even if others precede it in the order."""
    scheduler, runner = make_scheduler(max_num_queued_reqs=2), FakeRunner()
    scheduler.add([make_scheduled("ending", 64, 1)])
    run_one(scheduler, runner)
    run_one(scheduler, runner)
    assert scheduler.schedule() is not None  # its decode
    scheduler.add([make_scheduled("urgent", 256, 50, priority=-1)])
    with pytest.raises(QueueFullError) as full:
        scheduler.add([make_scheduled("late", 64, 1)])
    decode = make_scheduled("ending", 64, 1).cost.decode
    assert full.value.retry_after == pytest.approx(decode * scheduler.seconds_per_unit)


def test_the_queue_is_bounded_by_work() -> None:
    big, small = make_scheduled("big", 256, 100), make_scheduled("small", 64, 1)
    seconds = PER_TOKEN * total_work(big)
    scheduler = make_scheduler(max_queue_seconds=0.8 * seconds)
    scheduler.add([big])  # nobody else is there: it may run, long as it is
    with pytest.raises(QueueFullError) as full:
        scheduler.add([small])
    assert full.value.retry_after == pytest.approx(0.2 * seconds + PER_TOKEN * total_work(small))


def test_ids_in_use_and_too_many_at_once_are_refused() -> None:
    scheduler = make_scheduler(max_num_queued_reqs=3)
    scheduler.add([make_scheduled("a")])
    for ids in ("a", "bb"):
        with pytest.raises(InvalidRequestError) as wrong:
            scheduler.add([make_scheduled(id) for id in ids])
        assert wrong.value.param == "request_id"
    with pytest.raises(InvalidRequestError) as wrong:
        scheduler.add([make_scheduled(id) for id in "bcde"])
    assert wrong.value.param == "n"
    assert scheduler.num_waiting == 1


def test_eta_is_arithmetic_on_the_measured_rate() -> None:
    scheduler = make_scheduler(300, max_num_seqs=1)
    short, long = make_scheduled("short", 64, 4), make_scheduled("long", 256, 50)
    scheduler.add([long])
    assert scheduler.eta_seconds([short]) == pytest.approx(PER_TOKEN * total_work(short))
    assert scheduler.eta_seconds([long]) == pytest.approx(PER_TOKEN * total_work(long))
    scheduler.add([short])
    both = PER_TOKEN * (total_work(long) + total_work(short))
    assert scheduler.eta_seconds([long]) == pytest.approx(both)
    assert scheduler.queue_seconds == scheduler.work_seconds([long, short]) == pytest.approx(both)
    # The device turns out to be three times slower than it said, and is as fast as it said later: the rate follows
    # within its memory.
    endless = make_scheduled("endless", 64, 500)
    scheduler.add([endless])
    runner, requests = FakeRunner(), {"short": short, "long": long, "endless": endless}
    for factor, num_steps in ((3, 200), (1, 100)):
        for _ in range(num_steps):
            plan = scheduler.schedule()
            assert plan is not None
            scheduler.update(runner.execute(plan), factor * step_seconds(plan, requests))
        assert scheduler.seconds_per_unit == pytest.approx(factor * PER_TOKEN, rel=0.05)


def test_work_under_way_is_not_done() -> None:
    """Sending a plan changes no estimate; its result does."""
    scheduler, runner = make_scheduler(max_num_seqs=1), FakeRunner()
    request, new = make_scheduled("r", 64, 4), make_scheduled("new", 64, 9)
    scheduler.add([request])
    before = scheduler.eta_seconds([request]), scheduler.eta_seconds([new]), scheduler.queue_seconds
    plan = scheduler.schedule()
    assert plan is not None
    sent = scheduler.eta_seconds([request]), scheduler.eta_seconds([new]), scheduler.queue_seconds
    assert sent == pytest.approx(before)
    scheduler.update(runner.execute(plan), PER_TOKEN * request.cost.encode)
    done = scheduler.eta_seconds([request]), scheduler.eta_seconds([new]), scheduler.queue_seconds
    assert done == pytest.approx([seconds - PER_TOKEN * request.cost.encode for seconds in before])


def test_a_plan_that_only_releases_says_nothing_of_the_rate() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    scheduler.add([make_scheduled("r", 64, 4)])
    run_one(scheduler, runner)
    scheduler.abort(["r"])
    rate, plan = scheduler.seconds_per_unit, scheduler.schedule()
    assert plan is not None
    assert (plan.release, items_of(plan)) == (["r"], [])
    scheduler.update(runner.execute(plan), 5.0)
    assert scheduler.seconds_per_unit == rate


def test_a_plan_is_expected_to_take_what_the_same_one_before_it_took() -> None:
    scheduler, runner, request = make_scheduler(), FakeRunner(), make_scheduled("r", 64, 4)
    scheduler.add([request])
    expected = []
    for seconds in (9.0, 5.0, 7.0, 8.0, 2.0, 0.0):  # encode, four steps, decode
        plan = scheduler.schedule()
        assert plan is not None
        expected.append(scheduler.plan_seconds)
        rate, work = scheduler.seconds_per_unit, step_work(plan, {"r": request})
        if len(expected) in (1, 2, 6):  # the first of their kinds
            assert expected[-1] == pytest.approx(rate * work)
        scheduler.update(runner.execute(plan), seconds)
    assert expected[2:5] == [5.0, 7.0, 8.0]
    assert scheduler.plan_seconds == 0.0


def test_eta_predicts_a_simulated_run() -> None:
    """With one request per step, the estimate at arrival equals the latency."""
    for seed in range(20):
        rng = random.Random(seed)
        scheduler = make_scheduler(300, max_num_seqs=1)
        requests = [make_scheduled(f"r{n}", rng.choice([64, 128]), rng.choice([2, 5, 9])) for n in range(8)]
        scheduler.add(requests)
        estimates = {request.request_id: scheduler.eta_seconds([request]) for request in requests}
        by_id = {request.request_id: request for request in requests}
        runner, now = FakeRunner(), 0.0
        while plan := scheduler.schedule():
            seconds = step_seconds(plan, by_id)
            now += seconds
            for request_id in scheduler.update(runner.execute(plan), seconds).finished:
                assert estimates[request_id] == pytest.approx(now, rel=0.02)
