"""Recordings of steps with exchanges: ranks that compute the same sequences record alike, or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch

from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.step.cuda_graphs import Recorder

Output = TypeVar("Output")

_DONE, _NO_MEMORY, _FAILED = 0.0, 1.0, 2.0


class RanksRecorder:
    """A device's recorder, as one of several ranks uses it that record the same at the same time.

    What one rank cannot record none plays. An exchange counts as sent when it is played, not when it is recorded.
    """

    failure: str | None = None
    """See `Recorder`; all ranks of the group have one, or none."""

    def __init__(self, recorder: Recorder, group: Group, sent: Counter[str], device: torch.device) -> None:
        """group: those ranks, which exchange tensors on `device`; sent: where they count what they exchange."""
        self._recorder = recorder
        self._group = group
        self._sent = sent
        self._device = device

    def record(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        """Waits for the other ranks' recordings. Raises OutOfMemoryError where memory was all that any rank lacked."""
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
            recorded = self._recorder.record(counted)
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
        self._recorder.release()
