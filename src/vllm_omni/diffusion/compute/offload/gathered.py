"""Weight sharding: each rank keeps a part of every block, and the ranks gather a block one ahead of its use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vllm_omni.diffusion.compute.device.flat_weights import ALIGNMENT, FlatWeights
from vllm_omni.diffusion.compute.device.transfers import HOST, is_host
from vllm_omni.diffusion.compute.distributed.groups import Group, unbroken
from vllm_omni.diffusion.compute.offload.copies import Copies, Copy, CudaCopies
from vllm_omni.diffusion.compute.offload.layer_offload import BLOCKS, LayerOffload, StreamedLayers

logger = logging.getLogger(__name__)

_gather: Callable[..., Copy] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""All-gather into one tensor, which PyTorch 2.13 has renamed."""


class GatheredCopies(Copies):
    """Copies whose sources are parts of equal size, one on each rank of a group. All ranks start them in one order."""

    def __init__(self, device: torch.device, group: Group) -> None:
        self._device = device
        self._group = group
        self._cuda = None if is_host(device) else CudaCopies(device)
        """Stream and events of a GPU; exchanges of the CPU run in threads of gloo."""

    @property
    def generation(self) -> object:
        return self._group.process_group

    def slot(self, num_bytes: int) -> Tensor:
        num_bytes = self._group.size * part_bytes(num_bytes, self._group.size)
        if self._cuda is None:
            return torch.empty(num_bytes, dtype=torch.uint8)
        return self._cuda.slot(num_bytes)

    def copy(self, source: Tensor, slot: Tensor) -> Copy:
        """Gather the parts of all ranks. source: uint8 [bytes of a part], on the device."""
        gathered = slot[: self._group.size * len(source)]
        with nullcontext() if self._cuda is None else self._cuda.after_release(slot), unbroken():
            self._group.count("all_gather", source)
            return _gather(gathered, source, group=self._group.process_group, async_op=True)

    def wait(self, copy: Copy) -> None:
        with unbroken():
            copy.wait()

    def released(self, slot: Tensor) -> None:
        if self._cuda is not None:
            self._cuda.released(slot)


class WeightSharding(LayerOffload):
    """Blocks of the transformers, of which each rank of a group keeps a part on its device.

    The group are the ranks that share the tokens of a sequence: they run the same blocks in one order. Modulation and
    what else does not run in a step stays whole on each rank, because ranks run it at different times.
    """

    def __init__(self, device: torch.device, group: Group) -> None:
        super().__init__(device, resident_layers=0)
        self._group = group

    def start(self, free_bytes: int = 0) -> None:
        """Keep this rank's part of each block, whose weights have been read, and let the blocks be gathered."""
        for units in self._units[BLOCKS]:
            units[:] = [replace(unit, run=self._part(unit.run)) for unit in units]
        super().start()

    def _weights(self, layers: StreamedLayers) -> Iterator[tuple[str, nn.Module, FlatWeights]]:
        return (found for found in super()._weights(layers) if found[0] == BLOCKS)

    def _new_run(self, component: str, num_bytes: int) -> Tensor:
        """Memory for the whole weights of a block while they are read."""
        device = self._device if self._device.type == "meta" else HOST
        num_bytes = self._group.size * part_bytes(num_bytes, self._group.size)
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def _part(self, run: Tensor) -> Tensor:
        part: Tensor = run.chunk(self._group.size)[self._group.rank]
        return part.to(self._device, copy=True)

    def _copies(self) -> Copies:
        return GatheredCopies(self._device, self._group)

    @property
    def num_host_bytes(self) -> int:
        """Bytes of the blocks that are not on this device, because other ranks keep them."""
        return super().num_host_bytes - self.num_part_bytes

    @property
    def num_part_bytes(self) -> int:
        """Bytes of the parts that this rank keeps on its device."""
        return sum(part_bytes(unit.weights.num_bytes, self._group.size) for unit in self._units_by_kind[BLOCKS])

    def _log(self) -> None:
        units = self._units_by_kind[BLOCKS]
        logger.info(
            "weight sharding: each of %d ranks keeps %.2f GiB of %d blocks, which are gathered through %.2f GiB",
            self._group.size,
            self.num_part_bytes / 2**30,
            len(units),
            self.num_slot_bytes / 2**30,
        )


def part_bytes(num_bytes: int, num_parts: int) -> int:
    """Bytes of each part of a run, aligned; the parts together may be longer than the run."""
    return -(-num_bytes // (num_parts * ALIGNMENT)) * ALIGNMENT
