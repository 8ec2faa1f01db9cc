"""Text embeddings of the prompts last used: pictures of one prompt, and everybody's negative prompt, encode once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor


class PromptCache:
    """Least recently used first out, bounded by the bytes of the tensors it holds."""

    def __init__(self, encode: Callable[[str], Tensor], max_bytes: int) -> None:
        self._encode = encode
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, Tensor] = OrderedDict()
        self.num_bytes = 0

    def __call__(self, prompt: str) -> Tensor:
        """The embedding of `prompt`; the caller must not change it."""
        if prompt in self._entries:
            self._entries.move_to_end(prompt)
            return self._entries[prompt]
        embedding = self._entries[prompt] = self._encode(prompt)
        self.num_bytes += embedding.nbytes
        while self.num_bytes > self._max_bytes:
            self.num_bytes -= self._entries.popitem(last=False)[1].nbytes
        return embedding

    def __len__(self) -> int:
        return len(self._entries)
