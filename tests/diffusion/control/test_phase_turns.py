"""Encodes and decodes that displace the transformer: few turns, nobody starves, and prices count the copies."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

import pytest

from testbed.fakes import make_config, make_ready, make_scheduled
from tests.diffusion.control.simulation import OVERHEAD, PER_TOKEN, Simulation, items_of, random_arrivals, total_work
from vllm_omni.diffusion.control.phase_turns import COPY_SHARE
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.control.scheduler import Scheduler
from vllm_omni.diffusion.messages.plan import ItemError, StepPlan, StepResult

ENCODE_SECONDS, DECODE_SECONDS = 1.1, 0.4


def make_scheduler(
    max_batch_tokens: int = 512, encode: float = ENCODE_SECONDS, decode: float = DECODE_SECONDS, **settings: object
) -> Scheduler:
    ready = make_ready(
        max_batch_tokens=max_batch_tokens,
        seconds_per_unit=PER_TOKEN,
        step_overhead_seconds=OVERHEAD,
        encode_turn_seconds=encode,
        decode_turn_seconds=decode,
    )
    return Scheduler(make_config(**settings), ready)


@dataclass
class Turns:
    """Turns that plans make on a device where neither the text encoder nor the VAE has room beside the transformer."""

    encodes: int = 0
    decodes: int = 0
    _on_device: str = ""

    def copy_seconds(self, plan: StepPlan) -> float:
        """Count a plan. Returns the seconds of its copies."""
        before = self.seconds
        self.count(plan)
        return self.seconds - before

    def count(self, plan: StepPlan) -> None:
        if plan.encode or plan.encode_early:
            is_piece = plan.encode_pieces.keys() == set(plan.encode) and all(
                p.first for p in plan.encode_pieces.values()
            )
            self.encodes += not (is_piece and self._on_device == "encode")
            self._on_device = "encode"
        if plan.denoise:
            self._on_device = "denoise"
        if plan.decode or plan.preview:
            self.decodes += self._on_device != "decode"
            self._on_device = "decode"

    @property
    def seconds(self) -> float:
        return self.encodes * ENCODE_SECONDS + self.decodes * DECODE_SECONDS


def turns_of(plans: Iterable[StepPlan]) -> Turns:
    turns = Turns()
    for plan in plans:
        turns.count(plan)
    return turns


def queued(count: int, steps: int = 20) -> list[tuple[float, ScheduledRequest]]:
    return [(0.0, make_scheduled(f"r{n}", 64, steps)) for n in range(count)]


def test_eight_queued_requests_encode_together_and_decode_together() -> None:
    simulation = Simulation(make_scheduler(), queued(8)).run()
    first, *_, last = simulation.plans
    everyone = {f"r{n}" for n in range(8)}
    assert set(first.encode) == everyone
    assert {i for plan in simulation.plans for i in plan.decode} == everyone
    assert (turns := turns_of(simulation.plans)).encodes == 1
    assert turns.decodes <= 2
    assert last.decode or not items_of(last)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", ["fair", "fcfs"])
def test_random_workloads_end_with_few_turns(policy: str, depth: int) -> None:
    for seed in range(4):
        rng = random.Random(seed)
        arrivals = random_arrivals(rng, 40, load=rng.choice([1.0, 2.0, 5.0]))
        budget, max_num_seqs = rng.choice([300, 600, 5000]), rng.choice([3, 16])
        scheduler = make_scheduler(budget, max_num_seqs=max_num_seqs, scheduling_policy=policy)
        simulation = Simulation(scheduler, arrivals, depth).run()
        assert simulation.finished.keys() == simulation.requests.keys()
        assert scheduler.queue_seconds == 0
        assert scheduler.num_running == scheduler.num_waiting == 0
        for plan in simulation.plans:
            assert sum(map(bool, (plan.encode or plan.encode_early, plan.denoise, plan.decode))) <= 1
            assert len(items_of(plan)) <= max_num_seqs
        # The scheduler's own count, of which the last turn of a phase may be back without a copy.
        assert turns_of(simulation.plans).decodes <= scheduler._turns.num_turns


def test_turns_are_a_third_of_those_of_a_scheduler_that_does_not_know_them() -> None:
    for seed in range(6):
        rng = random.Random(seed)
        # Sixteen are queued at the start, and others come twice as fast as the device works.
        requests = [make_scheduled(f"r{n}", rng.choice([64, 96, 128]), rng.randint(5, 40)) for n in range(48)]
        work = sum(PER_TOKEN * total_work(request) for request in requests)
        arrivals = [(max(0.0, (n - 15) / 66 * work), request) for n, request in enumerate(requests)]
        turns, latency = [], []
        for seconds in ((ENCODE_SECONDS, DECODE_SECONDS), (0.0, 0.0)):
            counted = Turns()
            scheduler = make_scheduler(encode=seconds[0], decode=seconds[1], max_num_seqs=16)
            simulation = Simulation(scheduler, arrivals, depth=2, copy_seconds=counted.copy_seconds).run()
            turns.append(counted.encodes + counted.decodes)
            latency.append(sum(map(simulation.latency, simulation.requests)))
        assert 3 * turns[0] <= turns[1]
        assert latency[0] < 0.7 * latency[1]


def test_a_phase_waits_no_longer_than_its_turn_is_worth() -> None:
    """One long request has the device; those that arrive meanwhile are encoded and decoded in bounded time."""
    long_request = make_scheduled("long", 256, 3000)
    step = PER_TOKEN * long_request.cost.step + OVERHEAD
    arrivals = [(0.0, long_request)] + [(20.0 + 40 * n, make_scheduled(f"s{n}", 64, 1)) for n in range(5)]
    simulation = Simulation(make_scheduler(4096), arrivals, copy_seconds=Turns().copy_seconds)
    encoded: dict[str, float] = {}
    for plan in simulation.steps():
        encoded |= dict.fromkeys(plan.encode, simulation.now)
    most = (ENCODE_SECONDS + DECODE_SECONDS) / COPY_SHARE + 4 * step
    for n in range(5):
        assert encoded[f"s{n}"] - simulation.arrived[f"s{n}"] <= ENCODE_SECONDS / COPY_SHARE + 4 * step
        assert simulation.latency(f"s{n}") <= 2 * most
    assert simulation.finished["long"] == max(simulation.finished.values())


def test_copies_take_a_bounded_share_of_a_flood() -> None:
    """Each phase has a turn per `1 / COPY_SHARE` of its cost in work, and one more where nothing else is left to do."""
    arrivals = [(0.05 * n, make_scheduled(f"r{n}", 64, 40)) for n in range(150)]
    turns = Turns()
    simulation = Simulation(make_scheduler(max_num_seqs=16), arrivals, depth=2, copy_seconds=turns.copy_seconds).run()
    assert simulation.finished.keys() == simulation.requests.keys()
    assert turns.seconds <= 2 * COPY_SHARE * simulation.now


def test_a_phase_with_room_beside_the_transformer_joins_its_plans() -> None:
    arrivals = [(0.0, make_scheduled("long", 64, 20, priority=-1)), (0.0, make_scheduled("short", 64, 2))]
    simulation = Simulation(make_scheduler(decode=0.0), arrivals).run()
    assert any(plan.denoise and plan.decode for plan in simulation.plans)
    assert not any(plan.encode and plan.denoise for plan in simulation.plans)


def test_requests_begin_as_long_as_memory_lasts() -> None:
    """Steps of all requests under way have at most eight budgets of tokens; one alone may have more."""
    large = make_scheduled("large", 512, 4)
    tokens = large.cost.tokens_per_step
    budget = tokens // 3
    simulation = Simulation(make_scheduler(budget), [(0.0, make_scheduled(f"l{n}", 512, 4)) for n in range(6)])
    under_way: set[str] = set()
    for plan in simulation.steps():
        under_way |= set(plan.encode)
        under_way -= set(plan.release)
        assert len(under_way) <= 2 + 1  # one may have ended and not be released
    assert len(simulation.finished) == 6


def test_prices_count_turns() -> None:
    requests = [request for _, request in queued(8)]
    with_turns, without = make_scheduler(max_num_seqs=4), make_scheduler(encode=0.0, decode=0.0, max_num_seqs=4)
    turns = 2 * (ENCODE_SECONDS + DECODE_SECONDS)  # four share one
    for scheduler in (with_turns, without):
        assert scheduler.queue_seconds == 0
    assert with_turns.work_seconds(requests) == pytest.approx(without.work_seconds(requests) + turns)
    assert with_turns.eta_seconds(requests) == pytest.approx(without.eta_seconds(requests) + turns)
    for scheduler in (with_turns, without):
        scheduler.add(requests)
    assert with_turns.queue_seconds == pytest.approx(without.queue_seconds + turns)
    with_turns.schedule(), without.schedule()
    assert with_turns.plan_seconds == pytest.approx(without.plan_seconds + ENCODE_SECONDS, abs=0.2)


def test_a_request_that_ran_out_of_memory_runs_alone_between_turns() -> None:
    scheduler = make_scheduler()
    simulation = Simulation(scheduler, queued(4, steps=6))
    run = simulation.runner.execute

    def failing(plan: StepPlan) -> StepResult:
        result = run(plan)
        if "r1" in plan.denoise and len(plan.denoise) > 1:
            result.errors["r1"] = ItemError("no room", "out_of_memory")
            result.advanced.remove("r1")
        return result

    simulation.runner.execute = failing  # type: ignore[method-assign]
    simulation.run()
    assert simulation.finished.keys() == {"r0", "r1", "r2", "r3"}
    alone = [plan for plan in simulation.plans if "r1" in plan.encode]
    assert len(alone) == 2
    assert alone[1].encode == ["r1"]
