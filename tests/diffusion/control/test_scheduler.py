"""The scheduler alone, on a simulated device."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from testbed.fakes import FakeRunner, make_config, make_ready, make_scheduled
from tests.diffusion.control.running import run_one, run_out
from tests.diffusion.control.simulation import (
    OVERHEAD,
    PER_TOKEN,
    Simulation,
    items_of,
    make_scheduler,
    num_items,
    random_arrivals,
    step_work,
    tokens_of,
    total_work,
)
from vllm_omni.diffusion.control.scheduled_request import RequestCost, ScheduledRequest
from vllm_omni.diffusion.control.scheduler import Scheduler
from vllm_omni.diffusion.control.updates import Update
from vllm_omni.diffusion.messages.plan import ItemError, StepPlan, StepResult

OUT_OF_MEMORY = ItemError("no room", "out_of_memory")
MOST_WORK_OF_OTHERS = 10.0
"""Requests overtake one of R units only if they arrive before this many times R units are done."""


@pytest.mark.parametrize("policy", ["fair", "fcfs"])
@pytest.mark.parametrize(
    ("depth", "seeds"), [pytest.param(1, range(20, 60), marks=pytest.mark.thorough), (2, range(20))], ids=["1", "2"]
)
def test_random_workloads_finish_within_budget(policy: str, depth: int, seeds: range) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        budget, max_num_seqs = rng.choice([100, 300, 600, 5000]), rng.choice([1, 3, 16])
        scheduler = make_scheduler(budget, max_num_seqs=max_num_seqs, scheduling_policy=policy)
        simulation = Simulation(scheduler, random_arrivals(rng, 25), depth)
        requests = simulation.requests
        for plan in simulation.steps():
            items = items_of(plan)
            assert len(items) <= max_num_seqs
            long_encode = max((requests[id].cost.encode for id in plan.encode), default=0) if plan.denoise else 0
            assert tokens_of(plan, requests) - long_encode <= budget or len(items) == 1
        assert simulation.finished.keys() == requests.keys()
        # The fake runner asserts that each made its steps; here: each was encoded and decoded once.
        assert sorted(id for plan in simulation.plans for id in plan.encode) == sorted(requests)
        assert sorted(id for plan in simulation.plans for id in plan.release) == sorted(requests)
        assert simulation.runner.num_states == 0
        assert scheduler.num_running == scheduler.num_waiting == scheduler.num_in_flight == 0
        assert scheduler.queue_seconds == 0


def test_nobody_starves() -> None:
    """A request of R units is not overtaken by what arrives more than 10 R units of work after it.

    Every plan while it waits is led by a request that goes before it, so the plans until its end are at most
    the items of all that can go before it.
    """
    for seed in range(25):
        rng = random.Random(1000 + seed)
        arrivals = [
            (at, make_scheduled(r.request_id, (r.request.height, r.request.width), r.num_steps))
            for at, r in random_arrivals(rng, 40, load=rng.choice([1.0, 2.0, 5.0]))
        ]
        scheduler = make_scheduler(rng.choice([100, 400, 2000]))
        simulation = Simulation(scheduler, arrivals)
        requests, work = simulation.requests, 0.0
        work_at_arrival: dict[str, float] = {}
        plans_at_arrival: dict[str, int] = {}
        plans_at_end: dict[str, int] = {}
        for number, plan in enumerate(simulation.steps()):
            for request_id in simulation.arrived.keys() - work_at_arrival.keys():
                work_at_arrival[request_id], plans_at_arrival[request_id] = work, number
            for request_id in plan.decode:
                plans_at_end[request_id] = number
            work += step_work(plan, requests)
        for request_id, request in requests.items():
            horizon = work_at_arrival[request_id] + MOST_WORK_OF_OTHERS * total_work(request)
            # Arrivals are noted one step late at most, which only makes the horizon later for them.
            ahead = [r for id, r in requests.items() if work_at_arrival[id] <= horizon]
            assert plans_at_end[request_id] - plans_at_arrival[request_id] <= sum(map(num_items, ahead))


def flood(short_steps: int = 2) -> list[tuple[float, ScheduledRequest]]:
    """One long request, and enough short ones to keep the device busy without end."""
    short = make_scheduled("x", 64, short_steps)
    gap = PER_TOKEN * short.cost.total(short_steps) + OVERHEAD * short_steps
    return [(0.0, make_scheduled("long", 256, 20))] + [
        (n * gap, make_scheduled(f"s{n}", 64, short_steps)) for n in range(2000)
    ]


def test_a_flood_of_short_requests_does_not_starve_a_long_one() -> None:
    simulation = Simulation(make_scheduler(300), flood()).run()
    alone = PER_TOKEN * total_work(make_scheduled("long", 256, 20))
    slowdown = simulation.latency("long") / alone
    assert 2 < slowdown < MOST_WORK_OF_OTHERS + 2  # it yields, and not for ever


def test_fair_beats_fcfs_on_a_mixed_workload() -> None:
    """Mean latency of short requests among a few long ones; nobody's last finish is later than the total work."""
    means: dict[str, float] = {}
    lasts = dict.fromkeys(("fair", "fcfs"), 0.0)
    for policy in ("fair", "fcfs"):
        total = 0.0
        for seed in range(10):
            rng = random.Random(seed)
            arrivals = [(rng.uniform(0, 20), make_scheduled(f"long{n}", 256, 50)) for n in range(4)]
            arrivals += [(rng.uniform(0, 20), make_scheduled(f"short{n}", 64, rng.choice([4, 10]))) for n in range(40)]
            simulation = Simulation(make_scheduler(300, scheduling_policy=policy), arrivals).run()
            total += sum(map(simulation.latency, simulation.finished)) / len(simulation.finished)
            lasts[policy] = max(lasts[policy], simulation.now)
        means[policy] = total / 10
    assert means["fair"] < 0.5 * means["fcfs"]
    assert lasts["fair"] < 1.05 * lasts["fcfs"]


@pytest.mark.parametrize("budget", [256, 400, 600])
def test_a_short_request_beside_a_long_one_stays_within_three_times_its_time_alone(budget: int) -> None:
    short = make_scheduled("short", 64, 4)
    alone = Simulation(make_scheduler(budget), [(0.0, short)], depth=2).run().latency("short")
    for begin in (0.0, 0.33, 2.01, 5.7, 7.0):
        arrivals = [(0.0, make_scheduled("long", 256, 80)), (begin, short)]
        simulation = Simulation(make_scheduler(budget), arrivals, depth=1).run()
        running_step = PER_TOKEN * arrivals[0][1].cost.step + OVERHEAD
        assert simulation.latency("short") < alone + 1.01 * running_step
        assert not any({"short", "long"} <= set(plan.denoise) for plan in simulation.plans)


def test_eight_small_requests_of_different_sizes_share_packs() -> None:
    sizes = [(64, 64), (64, 96), (96, 64), (96, 96), (64, 128), (128, 64), (96, 128), (128, 128)]
    requests = [make_scheduled(f"r{n}", size, 10) for n, size in enumerate(sizes)]
    simulation = Simulation(make_scheduler(512), [(0.0, request) for request in requests]).run()
    denoising = [plan for plan in simulation.plans if plan.denoise]
    assert len(denoising) <= 20  # not all 80 steps: ten do not hold 680 tokens


@pytest.mark.parametrize("policy", ["fair", "fcfs"])
def test_an_encode_does_not_wait_behind_a_whole_request(policy: str) -> None:
    """Large encodes join steps of other requests, one per step."""
    cost = RequestCost(encode=1000.0, step=60.0, decode=100.0, branch_tokens=(60,))
    requests = [make_scheduled(f"r{n}", 64, 20, cost=cost) for n in range(8)]
    scheduler = make_scheduler(512, scheduling_policy=policy)
    simulation = Simulation(scheduler, [(0.0, request) for request in requests]).run()
    assert all(len(plan.encode) <= 1 for plan in simulation.plans)
    packs = [len(plan.denoise) for plan in simulation.plans if plan.denoise]
    assert packs[:9] == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert len(packs) == 27  # not 160


def test_priority_goes_before_policy() -> None:
    for policy in ("fair", "fcfs"):
        scheduler = make_scheduler(100, scheduling_policy=policy)
        scheduler.add([make_scheduled("short", 64, 1), make_scheduled("long", 256, 20, priority=-1)])
        scheduler.add([make_scheduled("late", 128, 5, priority=-2)])
        assert run_out(scheduler) == ["late", "long", "short"]


def test_fcfs_order() -> None:
    scheduler = make_scheduler(100, scheduling_policy="fcfs", max_num_seqs=1)
    requests = [make_scheduled("a", 256, 9), make_scheduled("b", 64, 1), make_scheduled("c", 128, 3)]
    scheduler.add(requests)
    assert run_out(scheduler) == ["a", "b", "c"]


def test_fair_order_is_least_remaining_work() -> None:
    scheduler = make_scheduler(100, max_num_seqs=1)
    scheduler.add([make_scheduled("a", 256, 9), make_scheduled("b", 64, 1), make_scheduled("c", 128, 3)])
    assert run_out(scheduler) == ["b", "c", "a"]


def test_work_done_for_a_request_does_not_age_it() -> None:
    """Only work for other requests ages a request. Here there was none: least remaining work goes first."""
    scheduler, runner = make_scheduler(max_num_seqs=1), FakeRunner()
    scheduler.add([make_scheduled("first", 64, 40)])
    for _ in range(21):  # its encode and 20 steps
        run_one(scheduler, runner)
    scheduler.add([make_scheduled("shorter", 64, 19)])
    assert run_one(scheduler, runner).encode == ["shorter"]


def test_no_more_requests_are_begun_than_the_model_holds() -> None:
    """A shorter request that arrives later waits under every policy."""
    config = make_config(max_num_seqs=8)
    held = Scheduler(config, make_ready(max_num_seqs=1, max_running=1))
    runner = FakeRunner()
    held.add([make_scheduled("long", 64, 9)])
    run_one(held, runner)
    held.add([make_scheduled("short", 64, 1), make_scheduled("other", 64, 1)])
    while held.num_running or held.num_waiting:
        plan = run_one(held, runner)
        assert len(items_of(plan)) <= 1
        assert held.num_running <= 1
    assert [plan.encode for plan in runner.plans if plan.encode] == [["long"], ["short"], ["other"]]


def test_an_aborted_request_makes_room_for_the_next() -> None:
    scheduler, runner = Scheduler(make_config(), make_ready(max_num_seqs=1, max_running=1)), FakeRunner()
    scheduler.add([make_scheduled("a", 64, 9), make_scheduled("b", 64, 9)])
    run_one(scheduler, runner)
    scheduler.abort(["a"])
    assert run_one(scheduler, runner).encode == ["b"]


def test_a_finished_picture_does_not_wait_under_fcfs() -> None:
    """The decode goes first even if it does not fit into the step of the first request."""
    scheduler = make_scheduler(600, scheduling_policy="fcfs")
    cost = RequestCost(encode=10.0, step=50.0, decode=300.0, branch_tokens=(50,))
    scheduler.add([make_scheduled("long", 256, 50), make_scheduled("small", 64, 2, cost=cost)])
    assert run_out(scheduler) == ["small", "long"]


def test_a_step_led_by_an_encode_or_a_decode_holds_nothing_else() -> None:
    scheduler, runner = make_scheduler(1000), FakeRunner()
    scheduler.add([make_scheduled("long", 256, 30)])
    run_one(scheduler, runner)
    scheduler.add([make_scheduled("new", 64, 2)])
    plans = [run_one(scheduler, runner) for _ in range(4)]
    assert [(plan.encode, plan.denoise, plan.decode) for plan in plans] == [
        (["new"], [], []),
        ([], ["new"], []),  # 528 tokens beside its 48 would make its step eleven times longer
        ([], ["new"], []),
        ([], [], ["new"]),
    ]


@pytest.mark.parametrize(
    ("lead", "most"),
    [
        (300, 600),  # nobody more than triples the step
        (10, 500),  # but for a quarter of the budget
        (1600, 400),  # the rest of the budget
    ],
)
def test_as_much_joins_a_step_as_keeps_it_short(lead: int, most: int) -> None:
    for num_tokens, joins in ((most, True), (most + 1, False)):
        scheduler, runner = make_scheduler(2000, scheduling_policy="fcfs"), FakeRunner()
        cost = RequestCost(encode=1.0, step=1.0, decode=1.0, branch_tokens=(lead,))
        scheduler.add([make_scheduled("lead", 64, 5, cost=cost)])
        scheduler.add([make_scheduled("other", 64, 5, cost=replace(cost, branch_tokens=(num_tokens,)))])
        plans = [run_one(scheduler, runner) for _ in range(2)]
        assert plans[0].encode == ["lead", "other"]
        assert plans[1].denoise == (["lead", "other"] if joins else ["lead"])


def test_decode_takes_of_the_budget() -> None:
    """A decode in a step uses tokens of the budget."""
    scheduler = make_scheduler(300, scheduling_policy="fcfs")
    requests = [make_scheduled("lead", 128, 30, priority=-1), make_scheduled("a", 64, 1), make_scheduled("b", 128, 30)]
    scheduler.add(requests)
    by_id = {request.request_id: request for request in requests}
    runner = FakeRunner()
    plans = [run_one(scheduler, runner) for _ in range(30)]
    assert all(tokens_of(plan, by_id) <= 300 for plan in plans)
    (mixed,) = [plan for plan in plans if plan.decode]
    assert tokens_of(mixed, by_id) + by_id["b"].cost.tokens_per_step > 300
    assert mixed.denoise == ["lead"]
    assert ["lead", "b"] in [plan.denoise for plan in plans]


def test_abort_frees_the_place_at_the_next_plan() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        scheduler = make_scheduler(300, max_num_seqs=2, scheduling_policy=rng.choice(["fair", "fcfs"]))
        scheduler.add([make_scheduled(f"r{n}", 64, rng.choice([3, 6, 9])) for n in range(6)])
        runner, alive, finished = FakeRunner(), {f"r{n}" for n in range(6)}, set()
        aborted: set[str] = set()
        plans: list[StepPlan] = []
        while True:
            while scheduler.num_in_flight < 2 and (plan := scheduler.schedule()):
                assert not aborted & set(items_of(plan))
                assert plan.release or len(items_of(plan)) >= min(2, len(alive) > 0)
                plans.append(plan)
            if not plans:
                break
            if rng.random() < 0.2 and alive:
                victim = rng.choice(sorted(alive))
                known = scheduler.abort([victim, "nobody", victim])
                assert list(known) == [victim]
                runner.abort([id for id, is_sent in known.items() if is_sent])
                aborted.add(victim)
                alive.discard(victim)
            update = scheduler.update(runner.execute(plans.pop(0)), 0.01)
            assert not aborted & set(update.finished)
            assert not update.failed
            finished.update(update.finished)
            alive.difference_update(update.finished)
        assert finished | aborted == {f"r{n}" for n in range(6)}
        assert runner.num_states == 0


def test_an_id_may_come_again_after_an_abort() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    scheduler.add([make_scheduled("r", 64, 5)])
    plans = [scheduler.schedule(), scheduler.schedule()]
    scheduler.abort(["r"])
    runner.abort(["r"])
    scheduler.add([make_scheduled("r", 64, 3, seed=7)])
    for plan in plans:
        assert plan is not None
        assert scheduler.update(runner.execute(plan), 0.01) == Update()
    assert run_out(scheduler, runner) == ["r"]


def test_one_failure_leaves_the_others_alone() -> None:
    bad = ItemError("broken", "internal")
    runner = FakeRunner(errors=lambda id, phase, step: bad if id == "b" and step == 2 else None)
    scheduler = make_scheduler()
    scheduler.add([make_scheduled(id, 64, 4) for id in "abc"])
    failed: dict[str, ItemError] = {}
    finished: list[str] = []
    plans: list[StepPlan] = []
    while True:
        while scheduler.num_in_flight < 2 and (plan := scheduler.schedule()):
            plans.append(plan)
        if not plans:
            break
        update = scheduler.update(runner.execute(plans.pop(0)), 0.01)
        failed |= update.failed
        finished += update.finished
    assert failed == {"b": bad}
    assert sorted(finished) == ["a", "c"]
    assert runner.num_states == 0


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("always", [False, True])
def test_out_of_memory_in_company_is_tried_again_alone(depth: int, always: bool) -> None:
    def errors(request_id: str, phase: str, step: int) -> ItemError | None:
        is_bad = request_id == "b" and phase == "denoise" and step == 2
        return OUT_OF_MEMORY if is_bad and (always or len(items_of(runner.plans[-1])) > 1) else None

    arrivals = [(0.0, make_scheduled(id, 64, steps)) for id, steps in (("a", 9), ("b", 4), ("c", 9))]
    runner = FakeRunner(errors=errors)
    simulation = Simulation(make_scheduler(), arrivals, depth, runner).run()
    assert [id for update in simulation.updates for id in update.replayed] == ["b"]
    failed = [id for update in simulation.updates for id in update.failed]
    assert failed == (["b"] if always else [])
    assert sorted(simulation.finished) == (["a", "c"] if always else ["a", "b", "c"])
    encoded = [n for n, plan in enumerate(simulation.plans) if "b" in plan.encode]
    assert len(encoded) == 2
    for plan in simulation.plans[encoded[1] :]:
        assert "b" not in items_of(plan) or items_of(plan) == ["b"]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("always", [False, True])
def test_a_request_without_memory_begins_again_when_the_others_have_ended(depth: int, always: bool) -> None:
    """Requests hold memory between their steps: one that is alone in its plan may lack it all the same."""

    def errors(request_id: str, phase: str, step: int) -> ItemError | None:
        is_bad = (request_id, phase) == ("b", "encode")
        return OUT_OF_MEMORY if is_bad and (always or runner.holds_states_of_others("b")) else None

    runner = FakeRunner(errors=errors)
    long = [(0.0, make_scheduled("a", 64, 9)), (OVERHEAD, make_scheduled("b", 64, 4))]
    later = [(8 * OVERHEAD, make_scheduled("c", 64, 9))]
    simulation = Simulation(make_scheduler(10), [*long, *later], depth, runner).run()
    encodes = [plan for plan in simulation.plans if "b" in plan.encode]
    assert [items_of(plan) for plan in encodes] == [["b"], ["b"]]
    assert [id for update in simulation.updates for id in update.replayed] == ["b"]
    assert [id for update in simulation.updates for id in update.failed] == (["b"] if always else [])
    assert sorted(simulation.finished) == (["a", "c"] if always else ["a", "b", "c"])
    assert runner.num_states == 0


def test_a_request_that_the_worker_lost_fails_instead_of_hanging() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_scheduled("r", 64, 2)])
    for _ in range(2):
        plan = scheduler.schedule()
        assert plan is not None
        update = scheduler.update(StepResult(plan.step_id), 0.01)
    assert update.failed["r"].kind == "internal"
    assert scheduler.num_running == 0


def test_delivered_previews_are_not_made_again() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_scheduled("r", 64, 6, preview_steps=(2, 4))])
    runner = FakeRunner()
    for _ in range(4):  # encode and three steps
        run_one(scheduler, runner)
    assert [plan.preview for plan in runner.plans] == [[], [], ["r"], []]
    assert scheduler.reset().replayed == ["r"]
    again = FakeRunner()
    assert run_out(scheduler, again) == ["r"]
    assert [plan.preview for plan in again.plans if plan.denoise] == [[], [], [], ["r"], [], []]


def test_a_request_that_kills_workers_is_singled_out() -> None:
    """After the second death the suspects run alone, after the third the culprit fails."""
    scheduler = make_scheduler()
    scheduler.add([make_scheduled(id, 64, 4) for id in "abc"])
    failed: dict[str, ItemError] = {}
    finished: list[str] = []
    runner, deaths = FakeRunner(), 0
    while plan := scheduler.schedule():
        if "b" in plan.denoise:
            deaths += 1
            failed |= scheduler.reset().failed
            runner = FakeRunner()
            continue
        finished += scheduler.update(runner.execute(plan), 0.01).finished
    assert deaths == 3
    assert list(failed) == ["b"]
    assert sorted(finished) == ["a", "c"]


@pytest.mark.parametrize(("price", "together"), [(25.0, True), (100.0, False)])
def test_pictures_that_share_the_price_of_their_prompt_begin_and_end_together(price: float, together: bool) -> None:
    """One plan encodes all of them. With the full price for each, some would begin later."""
    cost = replace(make_scheduled("r", 64, 4).cost, encode=price)
    requests = [make_scheduled(f"r-{i}", 64, 4, cost=cost) for i in range(4)]
    simulation = Simulation(make_scheduler(200), [(0.0, request) for request in requests])
    packs = [plan.denoise for plan in simulation.steps() if plan.denoise]
    assert (packs == [["r-0", "r-1", "r-2", "r-3"]] * 4) == together
