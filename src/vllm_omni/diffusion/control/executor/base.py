"""What the engine asks of whatever runs its plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vllm_omni.diffusion.messages.plan import StepPlan, StepResult, WorkerReady


class Executor(Protocol):
    async def start(self) -> WorkerReady:
        """Start workers; after a death, fresh ones, which take over what the first ones chose by measuring and what
        changes pixels (see `Runner.start`). Raises ConfigError or WorkerDiedError."""

    def submit(self, plan: StepPlan) -> None:
        """Send a plan without waiting; at most two are under way."""

    def abort(self, request_ids: Sequence[str]) -> None:
        """Skip these requests in plans that were sent but not begun, too."""

    async def next_result(self) -> StepResult:
        """Results in the order of the plans. Raises WorkerDiedError, also while no plan is under way."""

    async def close(self) -> None:
        """End the workers. May be called twice."""

    def kill(self) -> None:
        """End the workers at once, without awaiting anything: for an owner whose loop may have ended."""
