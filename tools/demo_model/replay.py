"""Training steps as CUDA graphs, because small networks otherwise wait for kernel launches from Python."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch

Frame = TypeVar("Frame", bound=Hashable)


class Replay(Generic[Frame]):
    """Runner of training steps; on a CUDA device, one CUDA graph for each frame: the settings that shapes depend on.

    The first call for a frame runs the step eagerly, as a warm-up; the second captures it; later calls replay the
    graph. Every call is exactly one step. The step may read its inputs and tensors with fixed addresses, and change the
    latter in place. It must not draw random numbers or read values on the host. Later calls overwrite its result.
    """

    def __init__(
        self, step: Callable[[Frame, list[torch.Tensor]], dict[str, torch.Tensor]], device: torch.device
    ) -> None:
        self._step, self._device = step, device
        self._stream: Any = torch.cuda.Stream() if device.type == "cuda" else None
        self._pool: Any = None
        self._inputs: dict[Frame, list[torch.Tensor]] = {}
        self._graphs: dict[Frame, tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor]]] = {}

    def __call__(self, frame: Frame, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._stream is None:
            return self._step(frame, inputs)
        if frame not in self._inputs:
            self._inputs[frame] = [torch.empty_like(x, device=self._device) for x in inputs]
            self._fill(frame, inputs)
            return self._run_as_it_is(frame)
        self._fill(frame, inputs)
        if frame not in self._graphs:
            self._graphs[frame] = self._record(frame)
        graph, results = self._graphs[frame]
        graph.replay()
        return results

    def _fill(self, frame: Frame, inputs: list[torch.Tensor]) -> None:
        for kept, new in zip(self._inputs[frame], inputs, strict=True):
            kept.copy_(new, non_blocking=True)

    def _run_as_it_is(self, frame: Frame) -> dict[str, torch.Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            results = self._step(frame, self._inputs[frame])
        torch.cuda.current_stream().wait_stream(self._stream)
        return results

    def _record(self, frame: Frame) -> tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            results = self._step(frame, self._inputs[frame])
        self._pool = graph.pool()
        return graph, results
