"""Capture of work as CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.device.failures import is_out_of_memory

Output = TypeVar("Output")


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pause Python's cyclic garbage collection: CUDA objects that it frees during a capture may void the capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class CudaGraphCapturer:
    """Capturer of CUDA graphs that share one memory pool, so two of them must not run at the same time."""

    failure: str | None = None
    """Reason of a capture that failed for another reason than memory; nothing is captured after it."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # CUDA cannot capture the main stream
        self._pool: Any = None
        self._first: tuple[Tensor, Callable[[], None]] | None = None

    def release(self) -> None:
        """Free the memory of the graphs that were deleted."""
        self._first = None

    def capture(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        """Capture `run` as a CUDA graph without executing it.

        Returns its output, whose tensors every replay overwrites, and the replay.
        Raises torch.OutOfMemoryError, also when CUDA has no memory for the graph itself.
        """
        with suppress(torch.OutOfMemoryError):
            return self._attempt(run)
        torch.cuda.empty_cache()  # PyTorch does not empty its cache during a capture
        return self._attempt(run)

    def _attempt(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        try:
            return self._capture_in_pool(run)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise

    def _capture_in_pool(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        if self._first is None:
            # PyTorch cannot reuse a pool whose last graph was deleted: make a new pool with a graph that stays in it.
            self._pool = torch.cuda.graph_pool_handle()
            self._first = self._capture(lambda: torch.zeros(1, device=self._stream.device))
        return self._capture(run)

    def _capture(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream), no_garbage_collection():
            # thread_local: another thread may wait for the device during the capture.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = run()
                graph.capture_end()
            except BaseException:  # after an interrupt, too, the stream must not stay in capture mode
                self._abandon(graph)
                raise
        return output, graph.replay

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a failed capture. A void capture leaves its pool open, which would keep memory from other streams."""
        try:
            graph.capture_end()
        except RuntimeError:
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
