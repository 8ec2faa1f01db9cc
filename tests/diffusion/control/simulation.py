"""A simulated device for the scheduler, and workloads for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from testbed.fakes import FakeRunner, make_config, make_ready, make_scheduled
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.control.scheduler import Scheduler
from vllm_omni.diffusion.control.updates import Update
from vllm_omni.diffusion.messages.plan import StepPlan

OVERHEAD = 0.010
PER_TOKEN = 0.00016
"""Seconds; about the speed of a small model on two cores."""


def make_scheduler(max_batch_tokens: int = 512, **settings: object) -> Scheduler:
    ready = make_ready(max_batch_tokens=max_batch_tokens, seconds_per_unit=PER_TOKEN, step_overhead_seconds=OVERHEAD)
    return Scheduler(make_config(**settings), ready)


@dataclass
class Simulation:
    """A device with its own clock: `depth` plans in flight; a step takes time for its overhead and its tokens."""

    scheduler: Scheduler
    arrivals: list[tuple[float, ScheduledRequest]]
    depth: int = 1
    runner: FakeRunner = field(default_factory=FakeRunner)
    now: float = 0.0
    finished: dict[str, float] = field(default_factory=dict)
    arrived: dict[str, float] = field(default_factory=dict)
    plans: list[StepPlan] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    copy_seconds: Callable[[StepPlan], float] = lambda plan: 0.0
    """Seconds that a plan takes besides its work."""

    def run(self) -> Simulation:
        for _ in self.steps():
            pass
        return self

    def steps(self) -> Iterator[StepPlan]:
        waiting = sorted(self.arrivals, key=lambda arrival: arrival[0])
        in_flight: list[StepPlan] = []
        while True:
            while waiting and waiting[0][0] <= self.now:
                at, request = waiting.pop(0)
                self.scheduler.add([request])
                self.arrived[request.request_id] = at
            while len(in_flight) < self.depth and (plan := self.scheduler.schedule()):
                in_flight.append(plan)
                self.plans.append(plan)
            if not in_flight:
                if not waiting:
                    return
                self.now = waiting[0][0]
                continue
            plan = in_flight.pop(0)
            result = self.runner.execute(plan)
            seconds = step_seconds(plan, self.requests) + self.copy_seconds(plan)
            self.now += seconds
            update = self.scheduler.update(result, seconds)
            self.updates.append(update)
            self.finished.update(dict.fromkeys(update.finished, self.now))
            yield plan

    @cached_property
    def requests(self) -> dict[str, ScheduledRequest]:
        return {request.request_id: request for _, request in self.arrivals}

    def latency(self, request_id: str) -> float:
        return self.finished[request_id] - self.arrived[request_id]


def step_seconds(plan: StepPlan, requests: dict[str, ScheduledRequest]) -> float:
    units = encode_units(plan, requests)
    units += sum(requests[id].cost.step for id in plan.denoise)
    units += decode_units(plan, requests)
    return PER_TOKEN * units + OVERHEAD * bool(plan.denoise)


def tokens_of(plan: StepPlan, requests: dict[str, ScheduledRequest]) -> float:
    tokens = encode_units(plan, requests)
    tokens += sum(requests[id].cost.tokens_per_step for id in plan.denoise)
    return tokens + decode_units(plan, requests)


def encode_units(plan: StepPlan, requests: dict[str, ScheduledRequest]) -> float:
    """Units of the encodes, and pieces of them, in a plan; the text is encoded with the first piece."""
    units = 0.0
    for id in plan.encode:
        request, piece = requests[id], plan.encode_pieces.get(id)
        text = request.cost.encode - request.cost.encode_video
        if piece is None:
            units += request.cost.encode
        else:
            units += (text if piece.first == 0 else 0.0) + (piece.end - piece.first) * request.encoded_frame_cost
    return units


def decode_units(plan: StepPlan, requests: dict[str, ScheduledRequest]) -> float:
    """Units of the pictures, previews and pieces of videos that a plan decodes."""
    whole = sum(requests[id].cost.decode for id in plan.decode if id not in plan.pieces)
    previews = sum(requests[id].frame_cost for id in plan.preview)
    return whole + previews + sum((p.end - p.first) * requests[id].frame_cost for id, p in plan.pieces.items())


def items_of(plan: StepPlan) -> list[str]:
    return [*plan.encode, *plan.denoise, *plan.decode]


def num_items(request: ScheduledRequest) -> int:
    return request.num_steps + 2


def random_arrivals(rng: random.Random, count: int, load: float = 1.2) -> list[tuple[float, ScheduledRequest]]:
    """Mixed requests; with `load` above 1 they arrive faster than the device works."""
    arrivals, now = [], 0.0
    for n in range(count):
        steps = rng.choice([1, 2, 4, 10, 30])
        size = (rng.choice([64, 96, 128, 256]), rng.choice([64, 96, 128, 256]))
        previews = tuple(sorted(rng.sample(range(1, steps + 1), rng.randint(0, min(2, steps)))))
        num_latent_frames = rng.choice([1, 1, 5])
        request = make_scheduled(
            f"r{n}",
            size,
            steps,
            preview_steps=previews,
            priority=rng.choice([0, 0, 0, 1, -1]),
            num_latent_frames=num_latent_frames,
            num_frames=4 * num_latent_frames - 3,
        )
        arrivals.append((now, request))
        now += rng.expovariate(load / (PER_TOKEN * request.cost.total(steps) + OVERHEAD * steps))
    return arrivals


def step_work(plan: StepPlan, requests: dict[str, ScheduledRequest]) -> float:
    """Units of a plan, counted like the scheduler: every denoising step includes the overhead of a step."""
    return step_seconds(plan, requests) / PER_TOKEN + OVERHEAD / PER_TOKEN * max(len(plan.denoise) - 1, 0)


def total_work(request: ScheduledRequest) -> float:
    return request.cost.total(request.num_steps) + request.num_steps * OVERHEAD / PER_TOKEN
