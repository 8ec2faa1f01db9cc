"""Choice between a decode or an encode whole and one in tiles, by the memory that is free."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm_omni.diffusion.compute.device.free_memory import Memory

WHOLE_MARGIN = 1.15
"""Free bytes for each predicted byte of a whole decode: convolutions take workspace that no prediction counts."""
COMMON_SHARE = 0.5
"""Share of the memory free after loading, on the rank with least, in which an encode must fit that all ranks do alike;
activations, caches and CUDA graphs take the rest."""


class TileChoice:
    """Choice of tiles for pictures and videos that do not fit the device's memory whole.

    Until `memory` is set everything is done whole. A decode belongs to one rank, so the memory that is free now counts.
    An encode runs on each rank, and its latents must be alike on all: with several ranks, only what all of them knew
    after loading counts, and an encode that runs out of memory is not repeated in tiles.
    """

    memory: Memory | None = None
    common_bytes: int | None = None
    """Bytes of an encode that each of several ranks has room for; None: there is one rank."""

    def __init__(self, whole_bytes: Callable[[int, int, int], int] = lambda height, width, num_frames: 0) -> None:
        """whole_bytes: peak bytes of a whole decode by height and width in pixels and number of frames; 0: unknown."""
        self._whole_bytes = whole_bytes

    def watch(self, memory: Memory, least_free_bytes: int | None) -> None:
        """Choose by this memory. least_free_bytes: free on the rank with least, of several; None: one rank."""
        self.memory = memory
        self.common_bytes = None if least_free_bytes is None else int(COMMON_SHARE * least_free_bytes)

    def most_whole(self, height: int, width: int, num_frames: int = 1) -> int:
        """Pictures or videos of this size that fit the free memory at once, whole; 0: not even one does."""
        needed = self._whole_bytes(height, width, num_frames)
        if self.memory is None or not needed:
            return sys.maxsize
        return int(self.memory.free_memory_bytes() / (WHOLE_MARGIN * needed))

    def encodes_whole(self, height: int, width: int, num_frames: int = 1) -> bool:
        """Whether an encode of this size fits whole: the same answer on all ranks."""
        if self.common_bytes is None:
            return self.most_whole(height, width, num_frames) > 0
        return WHOLE_MARGIN * self._whole_bytes(height, width, num_frames) <= self.common_bytes

    @property
    def repeats_encodes(self) -> bool:
        """Whether an encode that ran out of memory may be repeated in tiles: other ranks do not repeat it."""
        return self.common_bytes is None

    def release(self) -> None:
        """Free cached memory before a smaller attempt."""
        if self.memory is not None:
            self.memory.release_memory()


@contextmanager
def tiling_on(vae: Any) -> Iterator[None]:
    """Let a VAE of diffusers decode and encode in its tiles within the context."""
    before, vae.use_tiling = vae.use_tiling, True
    try:
        yield
    finally:
        vae.use_tiling = before
