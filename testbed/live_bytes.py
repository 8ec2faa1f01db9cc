"""Count of the bytes that tensors hold at once, on the CPU or the meta device: the peak of a GPU's allocator."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors held at once, of all that operations took or gave."""

    def __init__(self, ignored: Iterable[Tensor] = (), device: str = "cpu") -> None:
        """ignored: tensors whose memory is not counted, such as weights. device: kind whose tensors count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._ignored = {_place(tensor) for tensor in ignored}
        self._alive: dict[int, weakref.ref[Tensor]] = {}
        self._device = device
        self._is_paused = False
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._is_paused:
            self.count((args, result))
        return result

    def count(self, tensors: Any) -> None:
        """Count these tensors, in any nested containers, with all others that are alive."""
        for leaf in tree_leaves(tensors):
            if isinstance(leaf, Tensor) and leaf.device.type == self._device:
                self._alive[id(leaf)] = weakref.ref(leaf)
        self._alive = {key: ref for key, ref in self._alive.items() if ref() is not None}
        storages = {_place(t): t.untyped_storage().nbytes() for t in self._tensors()}
        self.peak = max(self.peak, sum(size for place, size in storages.items() if place not in self._ignored))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing meanwhile; what lives on afterwards is counted when an operation takes it."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def _tensors(self) -> list[Tensor]:
        return [tensor for ref in self._alive.values() if (tensor := ref()) is not None]


def _place(tensor: Tensor) -> tuple[str, int]:
    """Identity of the memory of a tensor: its address, which several storages may share, or on meta the storage."""
    storage = tensor.untyped_storage()
    return tensor.device.type, storage._cdata if tensor.device.type == "meta" else storage.data_ptr()
