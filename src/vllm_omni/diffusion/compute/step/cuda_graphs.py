"""Capture of the blocks of small steps as CUDA graphs: launching kernel by kernel would keep the GPU waiting.

The second run of a membership is captured, and later runs replay the graph. Ranges of blocks that a step cache runs
separately are captured separately.
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
"""Most tokens of a captured step on each rank. The kernels of a larger step take longer than their launches, and its
graph would take much memory."""

Output = TypeVar("Output")


class Capturer(Protocol):
    """Captures CUDA graphs on a device, or on several ranks that agree on success."""

    failure: str | None
    """Reason of a failed capture, other than a lack of memory; after a failure nothing is captured."""

    def capture(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        """Capture `run` as a CUDA graph without executing it.

        Returns its output tensors, which every replay overwrites, and the replay.
        """
        ...

    def release(self) -> None:
        """Free the memory of graphs that were dropped."""
        ...


class CapturableBlocks(Blocks, Protocol):
    """Blocks whose modulation can be read from another tensor, which a captured graph needs."""

    @property
    def rows(self) -> Tensor:
        """Rows of modulation of all blocks: [layers, streams, rows, parts, D]."""
        ...

    def with_rows(self, rows: Tensor) -> Self:
        """The same blocks with `rows` as their modulation."""
        ...


class CapturedGraphs:
    """Captured graphs of one membership, by range of blocks and number of rows of modulation."""

    def __init__(self) -> None:
        self._seen: set[tuple[range, int]] = set()
        self._made: dict[tuple[range, int], _CapturedGraph | None] = {}

    def run(self, hidden: Hidden, blocks: CapturableBlocks, which: range, capturer: Capturer) -> Hidden:
        """Run the blocks `which`. Blocks that cannot be captured run eagerly, with a warning."""
        kind = which, blocks.rows.shape[2]
        if kind not in self._seen:  # eagerly once: libraries allocate workspaces for new shapes
            output = blocks.run(hidden, which)
            self._seen.add(kind)
            return output
        if kind not in self._made:
            self._made[kind] = _capture(hidden, blocks, which, capturer)
        graph = self._made[kind]
        return blocks.run(hidden, which) if graph is None else graph.replay(hidden, blocks.rows)


def _capture(hidden: Hidden, blocks: CapturableBlocks, which: range, capturer: Capturer) -> _CapturedGraph | None:
    if capturer.failure is not None:
        return None
    try:
        return _CapturedGraph(hidden, blocks, which, capturer)
    except torch.OutOfMemoryError as error:  # for the graph; without one the step may have enough
        logger.warning("no memory to capture a step of %d tokens: %s", blocks.pack.num_tokens, error)
    except Exception as error:
        logger.warning("a step of %d tokens cannot be captured: %s", blocks.pack.num_tokens, error)
        capturer.failure = str(error)
    return None


class _CapturedGraph:
    def __init__(self, hidden: Hidden, blocks: CapturableBlocks, which: range, capturer: Capturer) -> None:
        made: list[tuple[Hidden, CapturableBlocks]] = []

        def run() -> Hidden:
            if not made:  # within the capture, where all ranks learn of a lack of memory
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
        # Captured graphs share their memory: the next replay may overwrite these results.
        return Hidden(self._output.text.clone(), self._output.image.clone())


@dataclass(frozen=True)
class CapturedBlocks:
    """Blocks that capture what a membership runs repeatedly."""

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
        # The same part of a membership seldom runs again.
        return type(self)(self.blocks.select(members), CapturedGraphs(), self.capturer)


def captured(blocks: CapturableBlocks, captured_graphs: CapturedGraphs, capturer: Capturer | None) -> Blocks:
    """`blocks` with capture; `blocks` themselves without a capturer, or for steps too large to gain from it."""
    if capturer is None or capturer.failure is not None or blocks.pack.most_tokens > MAX_TOKENS:
        return blocks
    return CapturedBlocks(blocks, captured_graphs, capturer)
