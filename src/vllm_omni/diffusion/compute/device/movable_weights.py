"""Weights that leave the device while a worker sleeps, and come back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from vllm_omni.diffusion.compute.device.flat_weights import FlatWeights
from vllm_omni.diffusion.compute.device.host_runs import host_run


class Movable(Protocol):
    """Memory of weights that leaves the device and comes back."""

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        ...

    def leave(self) -> None:
        """Free the device memory; the weights are in host memory then. Waits for copies."""

    def reserve(self) -> None:
        """Allocate the device memory for `come_back`. Raises torch.OutOfMemoryError; nothing has changed then."""

    def cancel(self) -> None:
        """Free what `reserve` has allocated."""

    def come_back(self) -> None:
        """Use the memory that `reserve` has allocated. Waits for copies."""


class MovableWeights(Movable):
    """Parameters and buffers of some modules, which lie on the device or in host memory.

    Those that are not on the device at first stay where they are. The modules must not run in between. Strides, dtypes
    and the alignment stay the same, so that the modules compute the same values afterwards.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device, without: Iterable[Tensor] = ()) -> None:
        """without: parameters and buffers that are left alone."""
        modules = list(modules)
        self._device = device
        elsewhere = [tensor for tensor in FlatWeights(modules).tensors if tensor.device.type != device.type]
        self._weights = FlatWeights(modules, [*elsewhere, *without])
        self._on_host: Tensor | None = None
        self._reserved: Tensor | None = None
        """Device memory for the way back, allocated and not filled."""

    @property
    def num_bytes(self) -> int:
        return self._weights.num_bytes

    def leave(self) -> None:
        assert self._on_host is None, "the weights are on the device"
        run = host_run(self.num_bytes, self._device)
        self._weights.save(run)
        self._synchronize()
        self._weights.attach(run)
        self._on_host = run

    def reserve(self) -> None:
        self._reserved = torch.empty(self.num_bytes, dtype=torch.uint8, device=self._device)

    def cancel(self) -> None:
        self._reserved = None

    def come_back(self) -> None:
        assert self._on_host is not None, "the weights are in host memory"
        assert self._reserved is not None, "`reserve` comes first"
        run, self._reserved = self._reserved, None
        run.copy_(self._on_host, non_blocking=True)
        self._synchronize()
        self._weights.attach(run)
        self._on_host = None

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
