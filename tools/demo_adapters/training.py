"""Steps of a training of an adapter: optimizer, average of the weights, checkpoints and export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..demo_model.descent import Average, Descent
from ..demo_model.progress import Progress, cosine_after
from .low_rank import Adapter

AVERAGING = 0.998


@dataclass(frozen=True)
class Course:
    """Settings of a training. `export` is called with the average of the weights in place, after each checkpoint and
    at the end."""

    stage: str
    seed: int
    steps: int
    batch: int
    rate: float
    export: Callable[[], None]


class Training:
    """Training of an adapter in place, up to `course.steps`."""

    def __init__(self, adapter: Adapter, course: Course, progress: Progress) -> None:
        self.adapter, self.course, self.progress = adapter, course, progress
        parameters: list[torch.Tensor] = list(adapter.parameters())
        self.device = parameters[0].device
        self._descent = Descent(parameters, betas=(0.9, 0.98), weight_decay=0.0)
        self._average = Average(parameters, AVERAGING)
        self._state = {"adapter": adapter, "optimizer": self._descent, "average": self._average}

    def resume(self) -> range:
        """Load the checkpoint in `progress` if there is one; return the steps that are left."""
        return range(self.progress.resume(self.course.stage, self._state), self.course.steps)

    def begin(self, step: int) -> None:
        """Set the rate and the average for a step. Call it before `descend`, outside of the captured step."""
        self._descent.rate.fill_(cosine_after(self.course.rate, step, self.course.steps, warm_up=50, start=0.4))
        self._average.set_step(step)

    def descend(self, loss: torch.Tensor) -> None:
        self._descent.step(loss)
        self._average.update()

    def end(self, step: int, values: dict[str, torch.Tensor]) -> None:
        """Record a step that is done; write what is due: log, checkpoint, export."""
        course = self.course
        self.progress.step(course.stage, step + 1, course.steps, self._state, **values)
        if self.progress.is_saved(step + 1, course.steps):
            with self._average.in_place():
                course.export()
