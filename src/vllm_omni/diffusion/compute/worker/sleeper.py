"""Sleep of one rank: its weights move to host memory, and everything else leaves the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from vllm_omni.diffusion.compute.coordination.ranks import Ranks
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.device.failures import is_out_of_memory
from vllm_omni.diffusion.compute.device.movable_weights import Movable
from vllm_omni.diffusion.compute.step.pipeline import Pipeline
from vllm_omni.diffusion.messages.weights_moved import ANOTHER_RANK, WeightsMoved


class Sleeper:
    """Moves the weights of one pipeline. All ranks of the replica call `sleep` and `wake_up` together, in turn."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._moved: Sequence[Movable] = ()
        """Weights that are in host memory."""

    def sleep(self, pipeline: Pipeline[Any]) -> WeightsMoved:
        """Move the weights to host memory. The pipeline has no request.

        Captured graphs, caches and adapters are dropped; compiled code stays.
        """
        start = time.perf_counter()
        self._device.synchronize()
        pipeline.drop_caches()
        self._device.free_everything()  # captured graphs read weights by their addresses: they go first
        self._moved = pipeline.movable_weights()
        for weights in self._moved:
            weights.leave()
        self._device.free_everything()
        return self._report(start)

    def wake_up(self, ranks: Ranks) -> WeightsMoved:
        """Move the weights back, unless a rank lacks device memory: then all ranks sleep on."""
        start = time.perf_counter()
        failure = self._reserve()
        (any_failed,) = ranks.unite([bool(failure)])
        if any_failed:
            for weights in self._moved:
                weights.cancel()
            self._device.free_everything()
            return WeightsMoved(
                0, time.perf_counter() - start, self._device.reserved_memory_bytes(), failure or ANOTHER_RANK
            )
        for weights in self._moved:
            weights.come_back()
        report = self._report(start)
        self._moved = ()
        return report

    def _reserve(self) -> str:
        """Allocate device memory for all weights. Returns the reason of a lack of memory; empty: it is there."""
        try:
            for weights in self._moved:
                weights.reserve()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            needed = sum(weights.num_bytes for weights in self._moved)
            return f"the weights take {needed / 1e9:.1f} GB of device memory: {str(error).partition(chr(10))[0]}"
        return ""

    def _report(self, start: float) -> WeightsMoved:
        num_bytes = sum(weights.num_bytes for weights in self._moved)
        return WeightsMoved(num_bytes, time.perf_counter() - start, self._device.reserved_memory_bytes())
