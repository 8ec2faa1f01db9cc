"""CUDA graphs of steps with exchanges: ranks that compute the same sequences all capture a step, or none does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch

from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.step.cuda_graphs import Capturer

Output = TypeVar("Output")

_DONE, _NO_MEMORY, _FAILED = 0.0, 1.0, 2.0


class RankGroupCapturer:
    """A device's capturer, as one of several ranks uses it that record the same at the same time.

    What one rank cannot record none plays. An exchange counts as sent when it is played, not when it is recorded.
    """

    failure: str | None = None
    """See `Capturer`; all ranks of the group have one, or none."""

    def __init__(self, capturer: Capturer, group: Group, sent: Counter[str], device: torch.device) -> None:
        """group: those ranks, which exchange tensors on `device`; sent: where they count what they exchange."""
        self._capturer = capturer
        self._group = group
        self._sent = sent
        self._device = device

    def capture(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        """Capture, and wait for the other ranks to do the same. Raises OutOfMemoryError if memory alone was missing."""
        before = Counter(self._sent)
        cost: Counter[str] = Counter()

        def counted() -> Output:
            nonlocal cost
            start = Counter(self._sent)
            output = run()
            cost = self._sent - start
            return output

        recorded = None
        outcome, reason = _DONE, "on another rank"
        try:
            recorded = self._capturer.capture(counted)
        except torch.OutOfMemoryError as error:
            outcome, reason = _NO_MEMORY, str(error)
        except Exception as error:
            outcome, reason = _FAILED, str(error)
        self._sent.clear()
        self._sent.update(before)
        worst = float(self._group.all_max(torch.tensor(outcome, device=self._device)))
        if worst == _NO_MEMORY:
            raise torch.OutOfMemoryError(reason)
        if recorded is None or worst == _FAILED:
            raise RuntimeError(reason)
        output, play = recorded

        def replay() -> None:
            play()
            self._sent.update(cost)

        return output, replay

    def release(self) -> None:
        self._capturer.release()
