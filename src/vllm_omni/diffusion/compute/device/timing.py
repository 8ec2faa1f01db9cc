"""Timing of the stages of a step on a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vllm_omni.diffusion.compute.device.streams import StreamEvent


class Stopwatch:
    """Seconds of each stage of a step. Measuring does not wait for the device; only `seconds` does."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, StreamEvent, StreamEvent]] = []

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the device time of the work launched within the context to `stage`."""
        start = StreamEvent(self._device)
        try:
            yield
        finally:
            self._spans.append((stage, start, StreamEvent(self._device)))

    def seconds(self) -> dict[str, float]:
        """Seconds by stage. Waits for the measured work, not for work launched after it."""
        totals: dict[str, float] = {}
        for stage, start, end in self._spans:
            end.wait()
            totals[stage] = totals.get(stage, 0.0) + end.seconds_since(start)
        return totals
