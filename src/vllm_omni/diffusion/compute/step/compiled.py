"""Parts of a transformer's blocks as compiled code: once for all blocks, and for packs of every size."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

logger = logging.getLogger(__name__)

Backend = str | Callable[..., Any]
"""Of torch.compile: its name, or from a graph and example inputs to what runs it."""


class CompiledPart:
    """A method of a block; called as `method(block, rows, *tokens)`, with tensors alone.

    rows: [streams, rows, parts, D], one row for all tokens or several; tokens: tensors whose first dim counts tokens,
    or None; dense. The weights of the block are inputs of the code, and so are numbers of tokens, so there is one
    compilation a *variant*: one row or several, and which of the tokens are None. PyTorch would take a size of 0 or 1
    for a constant, and compile once more: with so few tokens (a rank may hold as few of a short text) the method runs
    as it is.
    """

    def __init__(self, method: Callable[..., Any], backend: Backend) -> None:
        assert isinstance(method, FunctionType)
        self.name = method.__qualname__
        self.num_compilations = 0
        self.is_warm = False
        """From then on compiling is worth a warning: somebody waits."""
        self._method = method
        self._backend: Callable[..., Any] = torch._dynamo.lookup_backend(backend)
        # Compiled code hangs on the code object, and there is a limit to it: every model gets its own.
        own = FunctionType(method.__code__.replace(), method.__globals__, method.__name__, closure=method.__closure__)
        # With fullgraph, what cannot be compiled and the limit of compilations are errors, not detours.
        self._compiled = torch.compile(own, fullgraph=True, dynamic=False, backend=self._compile)

    def __call__(self, block: nn.Module, rows: Tensor, *tokens: Tensor | None) -> Any:
        if any(x is not None and len(x) < 2 for x in tokens):
            return self._method(block, rows, *tokens)
        if rows.shape[1] > 1:
            torch._dynamo.mark_dynamic(rows, 1)
        return self._compiled(block, rows, *(None if x is None else _sized_freely(x) for x in tokens))

    def _compile(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        start = time.perf_counter()
        code = self._backend(graph, inputs)
        self.num_compilations += 1
        logger.log(
            logging.WARNING if self.is_warm else logging.INFO,
            "compiled variant %d of %s in %.1f s%s",
            self.num_compilations,
            self.name,
            time.perf_counter() - start,
            ", while requests wait: the warm-up should have" if self.is_warm else "",
        )
        return code


def _sized_freely(x: Tensor) -> Tensor:
    """x, whose first dim is not to be taken for a constant."""
    if x.storage_offset():  # rare, and code compiled for it would be of no use to others
        x = x.clone()
    torch._dynamo.mark_dynamic(x, 0)
    return x


class CompiledBlocks:
    """The compiled parts of some blocks of one class, which use them from here on."""

    def __init__(self, blocks: Sequence[nn.Module], names: Sequence[str], backend: Backend) -> None:
        """names: methods of the blocks, see `CompiledPart`; what else the blocks do runs as it is."""
        self.parts = [CompiledPart(getattr(type(blocks[0]), name), backend) for name in names]
        for part, name in zip(self.parts, names):
            for block in blocks:
                setattr(block, name, MethodType(part, block))

    @property
    def num_compilations(self) -> int:
        return sum(part.num_compilations for part in self.parts)

    def end_warm_up(self) -> None:
        for part in self.parts:
            part.is_warm = True

    def __str__(self) -> str:
        return ", ".join(f"{part.name} ({part.num_compilations} variants)" for part in self.parts)
