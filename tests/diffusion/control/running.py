"""Run a scheduler step by step on a fake worker."""

from __future__ import annotations

from testbed.fakes import FakeRunner
from vllm_omni.diffusion.control.scheduler import Scheduler
from vllm_omni.diffusion.messages.plan import StepPlan


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
