"""Encodings last used: pictures of one prompt, everybody's negative prompt, and input pictures encode once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import Tensor

Key = TypeVar("Key", bound=Hashable)


class PromptCache(Generic[Key]):
    """Least recently used first out, bounded by the bytes of the tensors it holds."""

    def __init__(self, encode: Callable[[Key], Tensor], max_bytes: int) -> None:
        self._encode = encode
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Key, Tensor] = OrderedDict()
        self.num_bytes = 0

    def __call__(self, key: Key) -> Tensor:
        """The encoding of `key`, a prompt or what else `encode` takes; the caller must not change it."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        embedding = self._entries[key] = self._encode(key)
        self.num_bytes += embedding.nbytes
        while self.num_bytes > self._max_bytes:
            self.num_bytes -= self._entries.popitem(last=False)[1].nbytes
        return embedding

    def __len__(self) -> int:
        return len(self._entries)
