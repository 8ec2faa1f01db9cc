"""Capture of CUDA graphs with exchanges: all ranks of a rank group capture a step, or none does."""

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
    """Capturer of one rank of a rank group, whose ranks all capture the same blocks at the same time.

    If the capture fails on one rank, no rank uses it. The bytes of an exchange count as sent at each replay, not at the
    capture.
    """

    failure: str | None = None
    """See `Capturer`; set on all ranks of the group or on none."""

    def __init__(self, capturer: Capturer, group: Group, sent: Counter[str], device: torch.device) -> None:
        """group: the ranks, which exchange tensors on `device`; sent: counter of the bytes they exchange."""
        self._capturer = capturer
        self._group = group
        self._sent = sent
        self._device = device

    def capture(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        """Capture `run`, then learn whether the other ranks did. See `Capturer.capture` for the result.

        Raises torch.OutOfMemoryError when some rank lacked memory, RuntimeError when the capture failed otherwise.
        """
        before = Counter(self._sent)
        cost: Counter[str] = Counter()

        def counted() -> Output:
            nonlocal cost
            start = Counter(self._sent)
            output = run()
            cost = self._sent - start
            return output

        captured = None
        outcome, reason = _DONE, "on another rank"
        try:
            captured = self._capturer.capture(counted)
        except torch.OutOfMemoryError as error:
            outcome, reason = _NO_MEMORY, str(error)
        except Exception as error:
            outcome, reason = _FAILED, str(error)
        self._sent.clear()
        self._sent.update(before)
        worst = float(self._group.all_max(torch.tensor(outcome, device=self._device)))
        if worst == _NO_MEMORY:
            raise torch.OutOfMemoryError(reason)
        if captured is None or worst == _FAILED:
            raise RuntimeError(reason)
        output, replay_here = captured

        def replay() -> None:
            replay_here()
            self._sent.update(cost)

        return output, replay

    def release(self) -> None:
        self._capturer.release()
