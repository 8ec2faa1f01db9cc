"""Count of the bytes that tensors hold at once on the CPU: the peak that a GPU's allocator would see."""

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

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        """ignored: tensors whose memory is not counted, such as weights."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self._alive: dict[int, weakref.ref[Tensor]] = {}
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
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                self._alive[id(leaf)] = weakref.ref(leaf)
        self._alive = {key: ref for key, ref in self._alive.items() if ref() is not None}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._tensors()}
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
