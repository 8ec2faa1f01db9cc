"""Interface between the engine and the workers that run its plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vllm_omni.diffusion.messages.plan import StepPlan, StepResult, WorkerReady


class Executor(Protocol):
    """Workers of one replica, in a thread of this process or in processes of their own."""

    async def start(self) -> WorkerReady:
        """Start workers, or new ones after a death. Raises ConfigError or WorkerDiedError.

        New workers repeat the choices of the first ones that change pixels (see `Runner.start`).
        """

    def submit(self, plan: StepPlan) -> None:
        """Send a plan without waiting; at most two plans are in flight."""

    def abort(self, request_ids: Sequence[str]) -> None:
        """Skip these requests, also in plans that were sent and have not begun."""

    async def next_result(self) -> StepResult:
        """Result of the oldest plan in flight. Raises WorkerDiedError, also while no plan is in flight."""

    async def close(self) -> None:
        """End the workers. May be called twice."""

    def kill(self) -> None:
        """End the workers at once, without awaiting anything: for callers whose event loop may have ended."""
