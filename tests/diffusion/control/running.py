"""Run a scheduler step by step on a fake worker."""

from __future__ import annotations

from testbed.fakes import FakeRunner
from vllm_omni.diffusion.control.scheduler import Scheduler
from vllm_omni.diffusion.messages.plan import ItemError, StepPlan


def run_out(scheduler: Scheduler, runner: FakeRunner | None = None) -> list[str]:
    """Run until nothing is left; the order in which requests finished."""
    runner, order = runner or FakeRunner(), []
    while plan := scheduler.schedule():
        order += scheduler.update(runner.execute(plan), 0.01).finished
    return order


def run_one(scheduler: Scheduler, runner: FakeRunner) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.update(runner.execute(plan), 0.01)
    return plan


def run_ahead(scheduler: Scheduler, runner: FakeRunner, depth: int) -> list[str]:
    """Run with up to `depth` plans in flight until nothing is left; the order in which requests finished."""
    finished: list[str] = []
    plans: list[StepPlan] = []
    while True:
        while len(plans) < depth and (plan := scheduler.schedule()):
            plans.append(plan)
        if not plans:
            return finished
        finished += scheduler.update(runner.execute(plans.pop(0)), 0.01).finished


def runner_that_lacks_memory_once(phase: str, first: int) -> FakeRunner:
    """A runner whose first piece of `phase` (encode or decode) that begins at latent frame `first` fails."""
    failed: list[str] = []

    def errors(request_id: str, phase_now: str, step: int) -> ItemError | None:
        plan = runner.plans[-1]
        piece = plan.encode_pieces.get(request_id) if phase == "encode" else plan.pieces.get(request_id)
        if phase_now == phase and piece is not None and piece.first == first and not failed:
            failed.append(request_id)
            return ItemError("no room", "out_of_memory")
        return None

    runner = FakeRunner(errors=errors)  # its errors look at its newest plan
    return runner
