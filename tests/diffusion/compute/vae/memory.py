"""A fake of a device's memory, for choices of tiles."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class FakeMemory:
    free_bytes: int
    num_releases: int = 0

    def free_memory_bytes(self) -> int:
        return self.free_bytes

    def release_memory(self) -> None:
        self.num_releases += 1
