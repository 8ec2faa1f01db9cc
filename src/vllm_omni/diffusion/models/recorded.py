"""All blocks of a small step given to the device at once, which a host that sends kernel by kernel cannot keep busy.

The third step of a membership is recorded, and the later ones are the recording played again (on GPUs a CUDA graph).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from vllm_omni.diffusion.cache.base import Blocks
from vllm_omni.diffusion.packing import Hidden, Pack

logger = logging.getLogger(__name__)

MAX_TOKENS = 10_000
"""Of a step. A larger one keeps a device busy for longer than a host takes to send it, and would take much
memory."""
RUNS_BEFORE = 2
"""The first loads libraries and compiles; a membership that ends with the second is not worth the recording."""

Output = TypeVar("Output")


class Recorder(Protocol):
    """Of a device. See `worker.device`."""

    failure: Exception | None
    """Why something could not be recorded, for another reason than memory; from then on nothing is."""

    def record(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        """What `run` gives the device is not done, but recorded: its result, which each replay makes anew in place."""
        ...


class RecordableBlocks(Blocks, Protocol):
    @property
    def rows(self) -> Tensor:
        """The modulation of all blocks: [layers, streams, rows, parts, D]."""
        ...

    def with_rows(self, rows: Tensor) -> Self:
        """The same blocks, which read their modulation here."""
        ...


class Recordings:
    """Of one membership of sequences, whose tensors outlive them: one by number of rows of modulation."""

    def __init__(self) -> None:
        self._runs: Counter[int] = Counter()
        self._made: dict[int, _Recording] = {}

    def run(self, hidden: Hidden, blocks: RecordableBlocks, recorder: Recorder) -> Hidden:
        """All blocks. What cannot be recorded is sent as it is, with a warning."""
        num_rows = blocks.rows.shape[2]
        self._runs[num_rows] += 1
        if self._runs[num_rows] == RUNS_BEFORE + 1:
            try:
                self._made[num_rows] = _Recording(hidden, blocks, recorder)
            except torch.OutOfMemoryError as error:  # for the recording's own; without it the step may have enough
                logger.warning("no memory to record a step of %d tokens: %s", blocks.pack.num_tokens, error)
            except Exception as error:
                logger.warning("a step of %d tokens cannot be recorded: %s", blocks.pack.num_tokens, error)
                recorder.failure = error
        if (recording := self._made.get(num_rows)) is not None:
            return recording.replay(hidden, blocks.rows)
        return blocks.run(hidden, range(blocks.num_blocks))


class _Recording:
    def __init__(self, hidden: Hidden, blocks: RecordableBlocks, recorder: Recorder) -> None:
        self._text, self._image, self._rows = hidden.text.clone(), hidden.image.clone(), blocks.rows.clone()
        self._blocks = blocks.with_rows(self._rows)
        self._output, self._again = recorder.record(
            lambda: self._blocks.run(Hidden(self._text, self._image), range(blocks.num_blocks))
        )

    def replay(self, hidden: Hidden, rows: Tensor) -> Hidden:
        """What is returned is true until the next replay."""
        self._text.copy_(hidden.text)
        self._image.copy_(hidden.image)
        self._rows.copy_(rows)
        self._again()
        return self._output


@dataclass(frozen=True)
class RecordedBlocks:
    """`blocks`, recorded where all of them run."""

    blocks: RecordableBlocks
    recordings: Recordings
    recorder: Recorder

    @property
    def num_blocks(self) -> int:
        return self.blocks.num_blocks

    @property
    def pack(self) -> Pack:
        return self.blocks.pack

    def run(self, hidden: Hidden, which: range) -> Hidden:
        if len(which) < self.num_blocks:
            return self.blocks.run(hidden, which)
        return self.recordings.run(hidden, self.blocks, self.recorder)

    def signal(self, hidden: Hidden) -> Tensor:
        return self.blocks.signal(hidden)

    def select(self, members: Sequence[int]) -> Self:
        # A part of a membership seldom comes again.
        return type(self)(self.blocks.select(members), Recordings(), self.recorder)


def recorded(blocks: RecordableBlocks, recordings: Recordings, recorder: Recorder | None) -> Blocks:
    """`blocks` themselves where there is no recorder, or where recording does not pay."""
    if recorder is None or recorder.failure is not None or blocks.pack.num_tokens > MAX_TOKENS:
        return blocks
    return RecordedBlocks(blocks, recordings, recorder)
