"""The blocks of a small step given to the device at once, which a host that sends kernel by kernel cannot keep busy.

What a membership runs for the second time is recorded, and from then on the recording is played (on GPUs a CUDA graph).
Blocks that a step cache runs by themselves are recorded by themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.cache.base import Blocks
from vllm_omni.diffusion.compute.packing import Hidden, Pack

logger = logging.getLogger(__name__)

MAX_TOKENS = 10_000
"""Of a step, on each rank. A larger one keeps a device busy for longer than a host takes to send it, and would take
much memory."""

Output = TypeVar("Output")


class Capturer(Protocol):
    """Of a device, or of several that record alike. See `worker.device` and `worker.recording`."""

    failure: str | None
    """Why something could not be recorded, for another reason than memory; from then on nothing is."""

    def capture(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        """What `run` gives the device is not done, but recorded: its result, which each replay makes anew in place."""
        ...

    def release(self) -> None:
        """Give back the memory of graphs that are gone."""
        ...


class CapturableBlocks(Blocks, Protocol):
    @property
    def rows(self) -> Tensor:
        """The modulation of all blocks: [layers, streams, rows, parts, D]."""
        ...

    def with_rows(self, rows: Tensor) -> Self:
        """The same blocks, which read their modulation here."""
        ...


class CapturedGraphs:
    """Of one membership of sequences, whose tensors outlive them: by blocks and by number of rows of modulation."""

    def __init__(self) -> None:
        self._seen: set[tuple[range, int]] = set()
        self._made: dict[tuple[range, int], _CapturedGraph | None] = {}

    def run(self, hidden: Hidden, blocks: CapturableBlocks, which: range, capturer: Capturer) -> Hidden:
        """`which` blocks. What cannot be recorded is sent as it is, with a warning."""
        kind = which, blocks.rows.shape[2]
        if kind not in self._seen:  # what libraries make for new shapes they make now
            output = blocks.run(hidden, which)
            self._seen.add(kind)
            return output
        if kind not in self._made:
            self._made[kind] = _capture(hidden, blocks, which, capturer)
        recording = self._made[kind]
        return blocks.run(hidden, which) if recording is None else recording.replay(hidden, blocks.rows)


def _capture(hidden: Hidden, blocks: CapturableBlocks, which: range, capturer: Capturer) -> _CapturedGraph | None:
    if capturer.failure is not None:
        return None
    try:
        return _CapturedGraph(hidden, blocks, which, capturer)
    except torch.OutOfMemoryError as error:  # for the recording's own; without it the step may have enough
        logger.warning("no memory to record a step of %d tokens: %s", blocks.pack.num_tokens, error)
    except Exception as error:
        logger.warning("a step of %d tokens cannot be recorded: %s", blocks.pack.num_tokens, error)
        capturer.failure = str(error)
    return None


class _CapturedGraph:
    def __init__(self, hidden: Hidden, blocks: CapturableBlocks, which: range, capturer: Capturer) -> None:
        made: list[tuple[Hidden, CapturableBlocks]] = []

        def run() -> Hidden:
            if not made:  # within the recording, where a lack of memory is a failure that all ranks hear of
                inputs = Hidden(torch.empty_like(hidden.text), torch.empty_like(hidden.image))
                made.append((inputs, blocks.with_rows(torch.empty_like(blocks.rows))))
            inputs, own_blocks = made[0]
            return own_blocks.run(inputs, which)

        self._output, self._again = capturer.capture(run)
        ((self._inputs, self._blocks),) = made

    def replay(self, hidden: Hidden, rows: Tensor) -> Hidden:
        self._inputs.text.copy_(hidden.text)
        self._inputs.image.copy_(hidden.image)
        self._blocks.rows.copy_(rows)
        self._again()
        # Captured graphs share their memory: the next replay may write over this one's results.
        return Hidden(self._output.text.clone(), self._output.image.clone())


@dataclass(frozen=True)
class CapturedBlocks:
    """`blocks`, recorded where they run again and again."""

    blocks: CapturableBlocks
    captured_graphs: CapturedGraphs
    capturer: Capturer

    @property
    def num_blocks(self) -> int:
        return self.blocks.num_blocks

    @property
    def pack(self) -> Pack:
        return self.blocks.pack

    def run(self, hidden: Hidden, which: range) -> Hidden:
        return self.captured_graphs.run(hidden, self.blocks, which, self.capturer) if which else hidden

    def signal(self, hidden: Hidden) -> Tensor:
        return self.blocks.signal(hidden)

    def select(self, members: Sequence[int]) -> Self:
        # A part of a membership seldom comes again.
        return type(self)(self.blocks.select(members), CapturedGraphs(), self.capturer)


def captured(blocks: CapturableBlocks, captured_graphs: CapturedGraphs, capturer: Capturer | None) -> Blocks:
    """`blocks` themselves where there is no capturer, or where recording does not pay."""
    if capturer is None or capturer.failure is not None or blocks.pack.most_tokens > MAX_TOKENS:
        return blocks
    return CapturedBlocks(blocks, captured_graphs, capturer)
