"""Components that take turns on the device: they rest in host memory, and each comes when it is used.

Weights never change, so a component leaves without a copy: its tensors become those of the host again, and the device's
memory is freed. It comes by one copy of each of its runs, on the stream that uses it: the copy needs the memory of
components that have left, whose work is before it on that stream, so a stream of its own would have nothing to overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from vllm_omni.diffusion.compute.device.flat_weights import FlatWeights
from vllm_omni.diffusion.compute.device.host_runs import NewRun, own_runs
from vllm_omni.diffusion.compute.device.kinds import free_cached_memory
from vllm_omni.diffusion.compute.device.transfers import HOST
from vllm_omni.diffusion.compute.offload.residency import Residency

Arguments = ParamSpec("Arguments")
Output = TypeVar("Output")

TEXT_ENCODER, IMAGE_ENCODER, VAE = "text_encoder", "image_encoder", "vae"
TRANSFORMERS = ("transformer", "transformer_2")
"""Names of the components, which are those of their folders."""


class RunMemory:
    """Memory of a device for the runs of components that are there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def take(self, name: str, num_bytes: int) -> Tensor:
        """Memory for a run of the component `name`: uint8 [num_bytes]."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def give_back(self, name: str, runs: list[Tensor]) -> None:
        """Free the runs of a component. The caller keeps no other reference to them."""
        runs.clear()
        # At once, while their blocks are whole: a tensor in a part of one would keep the next component out.
        free_cached_memory(self._device)


@dataclass
class _Component:
    """A component whose weights rest in host memory, one run for each module."""

    weights: list[FlatWeights] = field(default_factory=list)
    host: list[Tensor] = field(default_factory=list)
    device: list[Tensor] = field(default_factory=list)
    """Runs on the device while it is there, in the order of `host`."""

    @property
    def num_bytes(self) -> int:
        return sum(weights.num_bytes for weights in self.weights)

    def attach(self, runs: Iterable[Tensor]) -> None:
        for weights, run in zip(self.weights, runs, strict=True):
            weights.attach(run)


class Turns:
    """Components of one model on one rank. With `is_on` False all are on the device, and every call does nothing.

    A component is used within `use`; uses of different components do not overlap. One thread makes all calls.
    """

    def __init__(
        self, device: torch.device, is_on: bool, memory: RunMemory | None = None, new_run: NewRun | None = None
    ) -> None:
        """memory: of the device; None: allocated as it is needed. new_run: host memory; None: of this process."""
        self.is_on = is_on
        self._new_run = new_run or own_runs(device)
        self._device = device
        self._memory = memory or RunMemory(device)
        self._components: dict[str, _Component] = {}
        self._residency: Residency | None = None
        self._in_use: list[str] = []
        """Names of the component in use, once for each use."""
        self.num_copied_bytes = 0
        """Bytes copied to the device so far."""

    # Loading ----------------------------------------------------------------------------------------------

    def rest(self, name: str) -> Callable[[nn.Module], None] | None:
        """Call that gives a module on the meta device its place in host memory, to be filled there.

        None: the module is filled on the device, where it stays.
        """
        if not self.is_on:
            return None

        def place(module: nn.Module) -> None:
            module.to_empty(device=HOST)  # pages that nobody writes take no memory
            self._add(name, module, save=False)

        return place

    def keep(self, name: str, modules: Iterable[nn.Module]) -> None:
        """Move modules that are loaded, wherever they are, to their place in host memory."""
        if self.is_on:
            for module in modules:
                self._add(name, module, save=True)

    def _add(self, name: str, module: nn.Module, save: bool) -> None:
        assert self._residency is None, "components are added before `begin`"
        weights = FlatWeights([module])
        run = self._new_run(name, weights.num_bytes)
        if save:
            weights.save(run)
        weights.attach(run)
        component = self._components.setdefault(name, _Component())
        component.weights.append(weights)
        component.host.append(run)

    def begin(self, max_bytes: int) -> None:
        """Begin to take turns. max_bytes: see `Residency`."""
        if self.is_on:
            sizes = {name: component.num_bytes for name, component in self._components.items()}
            self._residency = Residency(sizes, max_bytes)

    # Turns ------------------------------------------------------------------------------------------------

    @property
    def residency(self) -> Residency:
        """Sizes of the components, and those that are on the device."""
        assert self._residency is not None, "`begin` comes first"
        return self._residency

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Have a component on the device meanwhile. Raises torch.OutOfMemoryError when there is no memory for it."""
        if not self.is_on:
            yield
            return
        assert set(self._in_use) <= {name}, f"{name} is used within a use of {self._in_use}"
        self._come(name)
        self._in_use.append(name)
        try:
            yield
        finally:
            self._in_use.pop()

    def during(self, name: str, run: Callable[Arguments, Output]) -> Callable[Arguments, Output]:
        """Call of `run` that has a component on the device meanwhile."""

        def run_in_turn(*arguments: Arguments.args, **keywords: Arguments.kwargs) -> Output:
            with self.use(name):
                return run(*arguments, **keywords)

        return run_in_turn

    def release_memory(self) -> None:
        """Let all components leave that are not in use, after a lack of memory."""
        if self._residency is not None:
            for name in self.residency.present:
                if name not in self._in_use:
                    self._leave(name)

    def _come(self, name: str) -> None:
        residency = self.residency
        if name not in residency.present:
            for other in residency.leaving_for(name):
                self._leave(other)
            component = self._components[name]
            runs: list[Tensor] = []
            try:
                for host in component.host:
                    runs.append(self._memory.take(name, len(host)))
                    runs[-1].copy_(host, non_blocking=True)
            except BaseException:
                self._memory.give_back(name, runs)
                raise
            component.device = runs
            component.attach(runs)
            self.num_copied_bytes += component.num_bytes
        residency.note_use(name)

    def _leave(self, name: str) -> None:
        component = self._components[name]
        component.attach(component.host)
        self.residency.leave(name)
        self._memory.give_back(name, component.device)
