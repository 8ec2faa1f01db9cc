"""Random deaths, errors, aborts and requests for checkpoints at once: nothing is lost, repeated or left unanswered."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from testbed.fakes import FakeExecutor, FakeRunner, fake_image, fake_video
from tests.diffusion.control.engines import NotedEvents, iter_nowait, now_request, running_engine
from vllm_omni.diffusion.control.engine import DiffusionEngine
from vllm_omni.diffusion.control.events import Checkpointed, EngineEvent, Failed, Finished, Frames, Preview, StepDone
from vllm_omni.diffusion.control.plans_in_flight import MAX_PLANS_IN_FLIGHT
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.messages.plan import ItemError
from vllm_omni.errors import RequestAbortedError


@dataclass
class Watched:
    """Everything that the client of one request has seen."""

    request: ScheduledRequest
    steps: list[int] = field(default_factory=list)
    previews: list[int] = field(default_factory=list)
    num_frames: int = 0
    waited: int | None = None
    """Items done since a checkpoint was asked for; None: none is awaited."""
    newest: int = 0
    end: Finished | Failed | None = None

    def see(self, event: EngineEvent) -> None:
        assert self.end is None, "nothing follows the end"
        if self.waited is not None and isinstance(event, StepDone | Frames):
            self.waited += 1
            assert self.waited <= MAX_PLANS_IN_FLIGHT, "only plans that were sent before come before the answer"
        if isinstance(event, StepDone):
            self.steps.append(event.step)
        elif isinstance(event, Preview):
            self.previews.append(event.step)
        elif isinstance(event, Frames):
            assert event.first == self.num_frames
            self.num_frames += len(event.pixels)
        elif isinstance(event, Checkpointed):
            self.waited = None
            if event.checkpoint is not None:
                assert event.checkpoint.step >= self.newest
                self.newest = event.checkpoint.step
        elif isinstance(event, Finished | Failed):
            self.end = event

    def check(self) -> None:
        request = self.request
        if isinstance(self.end, Failed):
            assert isinstance(self.end.error, RequestAbortedError)
            return
        assert isinstance(self.end, Finished)
        first = 0 if request.resume is None else request.resume.step
        assert self.steps == [*range(first + 1, request.num_steps + 1)]
        assert self.previews == [step for step in request.preview_steps if step > first]
        is_video = request.num_latent_frames > 1
        assert np.array_equal(self.end.image, (fake_video if is_video else fake_image)(request.request))
        assert self.num_frames == (request.request.num_frames if is_video else 0)


def random_request(dice: random.Random, number: int) -> ScheduledRequest:
    steps, is_video = dice.randint(1, 12), dice.random() < 0.5
    request = now_request(
        f"r{number}", steps=steps, seed=number, num_frames=9 if is_video else 1, num_latent_frames=3 if is_video else 1
    )
    previews = tuple(sorted(dice.sample(range(1, steps + 1), dice.randint(0, min(2, steps)))))
    every = dice.choice([None, 1e-9, 0.01])
    return replace(request, preview_steps=previews, checkpoint_seconds=every)


def is_sometimes_full(dice: random.Random) -> FakeRunner:
    """A runner that runs out of memory now and then beside other requests."""
    runner = FakeRunner()

    def errors(request_id: str, phase: str, step: int) -> ItemError | None:
        is_full = runner.holds_states_of_others(request_id) and dice.random() < 0.02
        return ItemError("full", "out_of_memory") if is_full else None

    runner.errors = errors
    return runner


async def storm(dice: random.Random, engine: DiffusionEngine, watched: dict[str, Watched]) -> None:
    """Read all events; now and then ask for checkpoints and abort requests."""
    events = engine.add([one.request for one in watched.values()])
    while any(one.end is None for one in watched.values()):
        for event in (await events.get(), *iter_nowait(events)):
            watched[event.request_id].see(event)
        request_id = dice.choice(list(watched))
        if dice.random() < 0.15:
            watched[request_id].waited = watched[request_id].waited or 0
            engine.request_checkpoint([request_id])
        if dice.random() < 0.01:
            engine.abort([request_id])


@pytest.mark.parametrize("seed", range(25))
async def test_every_request_ends_once_and_every_question_is_answered(seed: int) -> None:
    dice = random.Random(seed)
    executor = FakeExecutor(lambda: is_sometimes_full(dice), die_at=set(dice.sample(range(2, 14), 2)))
    observer = NotedEvents()
    watched = {f"r{n}": Watched(random_request(dice, n)) for n in range(8)}
    async with running_engine(executor, observer, max_worker_restarts=100) as engine:
        await storm(dice, engine, watched)
        assert engine.status().num_running == engine.status().num_waiting == 0
    for one in watched.values():
        one.check()
    assert observer.restarts
