"""Interface of a device's memory, for code that makes its work smaller when little is free."""

from __future__ import annotations

from typing import Protocol


class Memory(Protocol):
    """Memory of a device."""

    def free_memory_bytes(self) -> int:
        """Memory that can still be allocated."""
        ...

    def release_memory(self) -> None:
        """Free the unused blocks of PyTorch's cache."""
        ...
