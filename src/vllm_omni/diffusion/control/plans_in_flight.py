"""Plans that were sent to the workers and have no result yet, and the rate that results measure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from vllm_omni.diffusion.control.queue.entries import Entry, Item, Phase
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult

MAX_PLANS_IN_FLIGHT = 2
_RATE_MEMORY = 0.95
"""Weight that past steps keep in the measured rate at each new step."""

Tasks = list[tuple[str, Phase, float]]
"""(request id, phase, units) of each item of a plan."""


@dataclass(frozen=True)
class PlanInFlight:
    """A plan, its items and its estimated work."""

    plan: StepPlan
    items: list[Item]
    steps: dict[str, int]
    """Request id -> denoising steps done after this plan."""
    work: float
    num_begun: int
    """Requests under way when it was made: its own, and others that hold memory meanwhile."""
    checkpoints: list[Entry] = field(default_factory=list)
    """Requests whose checkpoint it takes."""

    @property
    def tasks(self) -> Tasks:
        """Identity of each item. Plans with equal tasks take equally long, unless a step cache skips blocks."""
        return [(item.entry.request.request_id, item.phase, item.work) for item in self.items]


class PlansInFlight:
    """Plans in flight, oldest first. Measures seconds per unit of work over the finished plans."""

    def __init__(self, work: float, seconds: float) -> None:
        """`work` units in `seconds`: first estimate of the rate."""
        self._plans: deque[PlanInFlight] = deque()
        # Decaying sums; their quotient is the rate.
        self._rate_work, self._rate_seconds = work, seconds
        self._last: tuple[Tasks, float] = [], 0.0
        """Tasks of the last finished plan, and its seconds."""

    def __len__(self) -> int:
        return len(self._plans)

    def append(self, plan: PlanInFlight) -> None:
        """Add a plan that is about to be sent."""
        self._plans.append(plan)

    def finish_oldest(self, result: StepResult, seconds: float) -> PlanInFlight:
        """Remove and return the oldest plan, which took `seconds` and has this result."""
        finished = self._plans.popleft()
        assert result.step_id == finished.plan.step_id
        if finished.work > 0:
            self._rate_work = _RATE_MEMORY * self._rate_work + finished.work
            self._rate_seconds = _RATE_MEMORY * self._rate_seconds + seconds
        self._last = finished.tasks, seconds
        return finished

    def clear(self) -> list[Entry]:
        """Remove all plans; return the requests of the oldest, which may have killed the worker."""
        suspects = [item.entry for item in self._plans[0].items] if self._plans else []
        self._plans.clear()
        return suspects

    @property
    def work(self) -> float:
        """Units of all plans in flight."""
        return sum(plan.work for plan in self._plans)

    @property
    def seconds_per_unit(self) -> float:
        """Seconds that a unit of work takes, measured over the last steps."""
        return self._rate_seconds / self._rate_work

    @property
    def oldest_seconds(self) -> float:
        """Estimated duration of the oldest plan; 0 without one.

        A plan with the same tasks as the plan before it is expected to take the same time.
        """
        if not self._plans:
            return 0.0
        oldest, (last_tasks, last_seconds) = self._plans[0], self._last
        return last_seconds if oldest.tasks == last_tasks else oldest.work * self.seconds_per_unit
