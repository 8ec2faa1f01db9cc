"""Number of training steps: given, or as many as fit into a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from ..demo_model.progress import cosine_after

MEASURED = (60, 160)  # steps between which the speed is measured: after compiling and capturing


class Pace:
    """Steps of one stage. Without `steps`, it measures the speed of the first steps and then sets the number of steps
    that fits into `minutes` from the stage's start. The number is saved with the checkpoint, so that a resumed run
    keeps it, and logged, so that another run can be given the same one."""

    def __init__(self, steps: int | None, minutes: float, device: torch.device) -> None:
        self.given, self.minutes, self.device = steps, minutes, device
        self.count = steps or MEASURED[1] * 1000  # large until it is known, so that the rate does not fall yet

    def steps_from(self, first: int) -> Iterator[int]:
        """Yield the numbers of the steps to do from `first` on."""
        known = self.given is not None or first >= MEASURED[1]
        started = time.monotonic()
        begin = self._after(started) if first else None
        step = first
        while step < self.count:
            if not known and step == MEASURED[0]:
                begin = self._after(started)
            if not known and step == MEASURED[1] and begin is not None:
                self._decide(started, begin)
                known = True
            yield step
            step += 1

    def _after(self, started: float) -> float:
        """Seconds since the start, when the device has done all steps so far."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic() - started

    def _decide(self, started: float, begin: float) -> None:
        now = self._after(started)
        seconds = (now - begin) / (MEASURED[1] - MEASURED[0])
        left = max(0.0, 60 * self.minutes - now)
        self.count = MEASURED[1] + max(MEASURED[1], int(left / seconds))
        print(f"{1000 * seconds:.2f} ms a step: {self.count} steps", flush=True)

    def cosine(self, rate: float, step: int, warm_up: int, held: float) -> float:
        """Learning rate of this step: warm-up, held up to this part of the steps, then a cosine down to 1 %."""
        return cosine_after(rate, step, self.count, warm_up, held)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.given is None:
            self.count = state["count"]
