"""Layer-wise offload: blocks of transformers and layers of encoders rest in host memory and stream to the device."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, zip_longest

import torch
from torch import Tensor, nn

from vllm_omni.diffusion.compute.device.flat_weights import FlatWeights
from vllm_omni.diffusion.compute.device.host_runs import NewRun, own_runs
from vllm_omni.diffusion.compute.device.movable_weights import Movable
from vllm_omni.diffusion.compute.device.transfers import HOST
from vllm_omni.diffusion.compute.offload.copies import Copies, copies_for
from vllm_omni.diffusion.compute.offload.weight_stream import (
    NUM_SLOTS,
    Unit,
    WeightStream,
    bytes_of_slots,
    bytes_of_units,
)

logger = logging.getLogger(__name__)

BLOCKS, ONCE, ENCODERS = "blocks", "layers that run once a timestep or text", "layers of encoders"
"""Kinds of streamed modules. Those that run most often stay on the device first, where there is room."""
KINDS = (BLOCKS, ONCE, ENCODERS)


@dataclass(frozen=True)
class StreamedLayers:
    """Modules of one component that stream, in the order in which they run."""

    blocks: Sequence[nn.Module] = ()
    """Blocks of a transformer that run at every step."""
    once: Sequence[nn.Module] = ()
    """Layers of the transformer, in its blocks or not, that run by themselves and less often."""
    encoder: Sequence[nn.Module] = ()
    """Layers of a text or image encoder."""

    @property
    def by_kind(self) -> Mapping[str, Sequence[nn.Module]]:
        """Modules of each kind; one that lies in another comes first."""
        return {ONCE: self.once, BLOCKS: self.blocks, ENCODERS: self.encoder}


def encoder_layers(encoder: nn.Module) -> StreamedLayers:
    """The lists of layers in an encoder; lists within their layers belong to these."""
    found: list[nn.Module] = []
    pending = list(encoder.children())
    while pending:
        module = pending.pop(0)
        if isinstance(module, nn.ModuleList):
            found += module
        else:
            pending = [*module.children(), *pending]
    return StreamedLayers(encoder=found)


class LayerOffload(Movable):
    """Weights of a model's layers in host memory, and their streams.

    Only matrices stream. Vectors, such as biases, norms and the scales of float8, stay on the device: they are less
    than a hundredth of a block, and some are read outside of it.
    """

    def __init__(self, device: torch.device, resident_layers: int | None, host_memory: NewRun | None = None) -> None:
        """resident_layers: blocks of each transformer that stay on the device; None: `start` decides.

        host_memory: makes runs; None: of this process.

        On the meta device only the sizes are known.
        """
        self._device = device
        self._resident_layers = resident_layers
        self._host_memory = host_memory or own_runs(device)
        self._units: dict[str, list[list[Unit]]] = {kind: [] for kind in KINDS}
        """Units of each component, by kind."""
        self._num_modules = dict.fromkeys(KINDS, 0)
        self.streams: dict[str, WeightStream] = {}
        """Streams by kind, from `start` on."""

    def place(self, module: nn.Module, layers: StreamedLayers, component: str) -> None:
        """Allocate the memory of a module on the meta device: in host memory for `layers`, on the device for the rest.

        The layers must not run before `start`.
        """
        streamed = {id(tensor) for _, _, weights in self._weights(layers) for tensor in weights.tensors}
        host = self._device if self._device.type == "meta" else HOST
        # Empty tensors in host memory take no memory until something is written there.
        module._apply(lambda tensor: torch.empty_like(tensor, device=host if id(tensor) in streamed else self._device))
        units: dict[str, list[Unit]] = {}
        for kind, layer, weights in self._weights(layers):  # whose parameters are new objects now
            run = self._new_run(component, weights.num_bytes)
            weights.attach(run)
            units.setdefault(kind, []).append(Unit(layer, weights, run))
        for kind, its in units.items():
            self._units[kind].append(its)
        for kind, its_modules in layers.by_kind.items():
            self._num_modules[kind] += len(its_modules)

    def _weights(self, layers: StreamedLayers) -> Iterator[tuple[str, nn.Module, FlatWeights]]:
        """Kind, module and streamed weights of each layer."""
        taken: list[Tensor] = []
        for kind, modules in layers.by_kind.items():
            for number, layer in enumerate(modules):
                others = [tensor for tensor in _tensors(layer) if not _is_matrix(tensor)]
                weights = FlatWeights([layer], without=[*others, *taken])
                if kind != BLOCKS:
                    taken += weights.tensors
                elif number in spread(self._resident_layers or 0, len(modules)):
                    continue
                if weights.num_bytes:
                    yield kind, layer, weights

    def start(self, free_bytes: int = 0) -> None:
        """Let the layers stream, whose weights have been read.

        free_bytes: memory of the device for layers that stay there, where the number of blocks is not given.
        """
        if self._resident_layers is None:
            for kind, kept in self._fitting(free_bytes).items():
                self._keep(kind, kept)
        copies = self._copies()
        for kind, units in self._units_by_kind.items():
            if units:
                self.streams[kind] = WeightStream(units, copies)
        self._log()

    def _copies(self) -> Copies:
        return copies_for(self._device)

    def _fitting(self, free_bytes: int) -> dict[str, int]:
        """Units of each list that stay on the device, by kind: all of a kind, before any of the next one."""
        kept = {}
        left = free_bytes - self.num_slot_bytes
        for kind, units in self._units_by_kind.items():
            lists, more = self._units[kind], bytes_of_units(units) - bytes_of_slots(units)
            if more <= left:
                kept[kind] = max(map(len, lists), default=0)
                left -= more
                continue
            of_row = [bytes_of_units([unit for unit in row if unit is not None]) for row in zip_longest(*lists)]
            count = 0
            while sum(of_row[number] for number in spread(count + 1, len(of_row))) <= left:
                count += 1
            # Where the slots divide the rest, the last unit of a step and the first one of the next have two slots.
            kept[kind] = max(0, count - -(len(of_row) - count) % NUM_SLOTS)
            break
        return kept

    def _keep(self, kind: str, count: int) -> None:
        """Move some units of each list to the device for good."""
        for its in self._units[kind]:
            kept = spread(count, len(its))
            for number in kept:
                unit = its[number]
                unit.weights.attach(unit.run.to(self._device))
            its[:] = [unit for number, unit in enumerate(its) if number not in kept]

    def _new_run(self, component: str, num_bytes: int) -> Tensor:
        if self._device.type == "meta":
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return self._host_memory(component, num_bytes)

    @property
    def _units_by_kind(self) -> dict[str, list[Unit]]:
        return {kind: list(chain.from_iterable(lists)) for kind, lists in self._units.items()}

    @property
    def num_host_bytes(self) -> int:
        """Bytes of the weights in host memory."""
        return sum(map(bytes_of_units, self._units_by_kind.values()))

    @property
    def num_slot_bytes(self) -> int:
        """Bytes of the slots on the device."""
        return sum(map(bytes_of_slots, self._units_by_kind.values()))

    @property
    def num_bytes(self) -> int:
        return self.num_slot_bytes

    @property
    def streamed_units(self) -> list[Unit]:
        """Units that do not stay on the device."""
        return list(chain.from_iterable(self._units_by_kind.values()))

    @property
    def streamed_tensors(self) -> list[Tensor]:
        """Parameters that are parts of slots while the device is used."""
        return [tensor for unit in self.streamed_units for tensor in unit.weights.tensors]

    def leave(self) -> None:
        for stream in self.streams.values():
            stream.leave()

    def reserve(self) -> None:
        for stream in self.streams.values():
            stream.reserve()

    def cancel(self) -> None:
        for stream in self.streams.values():
            stream.cancel()

    def come_back(self) -> None:
        for stream in self.streams.values():
            stream.come_back()

    @property
    def num_resident_blocks(self) -> int:
        """Blocks of all transformers that stay on the device."""
        return self._num_modules[BLOCKS] - sum(map(len, self._units[BLOCKS]))

    @property
    def streams_blocks(self) -> bool:
        """Whether a block streams: not all stay on the device."""
        return BLOCKS in self.streams

    def copy_all(self) -> None:
        """Copy all blocks once, as a step does that computes nothing."""
        if self.streams_blocks:
            self.streams[BLOCKS].copy_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run steps without copies, with wrong weights: to time what they compute."""
        with ExitStack() as stack:
            if self.streams_blocks:
                stack.enter_context(self.streams[BLOCKS].paused())
            yield

    def _log(self) -> None:
        for kind in KINDS:
            if self._num_modules[kind]:
                logger.info(self._line(kind))

    def _line(self, kind: str) -> str:
        units, total = self._units_by_kind[kind], self._num_modules[kind]
        if not units:
            return f"offload: all {total} {kind} stay on the device"
        return (
            f"offload: {len(units)} of {total} {kind} stream from {bytes_of_units(units) / 2**30:.2f} GiB of host "
            f"memory through {bytes_of_slots(units) / 2**30:.2f} GiB on the device"
        )


def spread(count: int, total: int) -> set[int]:
    """Numbers of `count` of `total` layers, at even distances: while one computes, copies of the next ones go on.

    With the first ones resident, copies would wait for a slot in all that time.
    """
    count = min(count, total)
    return {number for number in range(total) if (number + 1) * count // total > number * count // total}


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and min(tensor.shape) > 1
