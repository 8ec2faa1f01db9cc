"""Streams of device work, and events that mark points in them. On a CPU work is done at once, so both do nothing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.device.kinds import CUDA


class Stream:
    """Work that a device executes in order: the main stream, or a separate CUDA stream beside it."""

    def __init__(self, device: torch.device, separate: bool) -> None:
        """`separate` asks for a CUDA stream of its own; a CPU has the main stream only."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if separate and device.type == CUDA else None

    @contextmanager
    def after(self, inputs: Iterable[Tensor]) -> Iterator[None]:
        """Launch work on this stream, after all earlier work. inputs: tensors that it reads and so keeps in memory."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for tensor in inputs:
            if tensor.is_cuda:
                tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield


class StreamEvent:
    """A point in the current stream of a device, recorded when the event is made."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = 0.0
        if device.type == CUDA:
            # A blocking wait leaves the CPU core to the thread that launches kernels.
            self._event = torch.cuda.Event(enable_timing=True, blocking=True)
            self._event.record(torch.cuda.current_stream(device))
        else:
            self._time = time.perf_counter()

    def wait(self) -> None:
        """Wait until the device reaches this point; work launched later is not waited for."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, start: StreamEvent) -> float:
        """Seconds from `start` to this event, both on the same stream and both reached."""
        if self._event is None or start._event is None:
            return self._time - start._time
        milliseconds: float = start._event.elapsed_time(self._event)
        return milliseconds / 1000
