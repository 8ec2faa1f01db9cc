"""Cache of recent encodings, so that repeated prompts, negative prompts and input pictures are encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import Tensor

Input = TypeVar("Input", bound=Hashable)


class PromptCache(Generic[Input]):
    """Most recently used encodings, up to `max_bytes`. key_of: hashable key of an input too large to keep."""

    def __init__(
        self,
        encode: Callable[[Input], Tensor],
        max_bytes: int,
        key_of: Callable[[Input], Hashable] = lambda value: value,
    ) -> None:
        self._encode = encode
        self._max_bytes = max_bytes
        self._key_of = key_of
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()
        self.num_bytes = 0

    def __call__(self, value: Input) -> Tensor:
        """Encoding of `value`, any input of `encode`; the caller must not change the tensor."""
        key = self._key_of(value)
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        embedding = self._entries[key] = self._encode(value)
        self.num_bytes += embedding.nbytes
        while self.num_bytes > self._max_bytes:
            self.num_bytes -= self._entries.popitem(last=False)[1].nbytes
        return embedding

    def clear(self) -> None:
        """Drop all encodings."""
        self._entries.clear()
        self.num_bytes = 0

    def __contains__(self, value: Input) -> bool:
        """Whether the encoding of `value` is kept."""
        return self._key_of(value) in self._entries

    def __len__(self) -> int:
        return len(self._entries)
