"""Compiled parts of a transformer's blocks: one compilation serves all blocks, and packs of every size."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

logger = logging.getLogger(__name__)

Backend = str | Callable[..., Any]
"""Backend of torch.compile: its name, or a function from a graph and example inputs to a callable."""
Tokens = Tensor | tuple[Any, ...] | None
"""Argument of a compiled part: a tensor, a named tuple of tensors, or None."""


class CompiledPart:
    """Compiled method of a block, called as `method(block, rows, *tokens)` with tensors and named tuples of them.

    rows: [streams, rows, parts, D], one row for all tokens or several. tokens: dense tensors whose first dim counts
    tokens, None, or named tuples of these. Weights and numbers of tokens are inputs of the compiled code, so that each
    *variant* is compiled once: one row or several, and which of the tokens are None. PyTorch treats a size of 0 or 1 as
    a constant and would compile again; with so few tokens (a rank may hold 0 or 1 of a short text) the method runs
    eagerly.
    """

    def __init__(self, method: Callable[..., Any], backend: Backend) -> None:
        assert isinstance(method, FunctionType)
        self.name = method.__qualname__
        self.num_compilations = 0
        self.is_warm = False
        """Whether the warm-up is over: a compilation then delays requests, and is logged as a warning."""
        self.is_eager = False
        """Whether calls run the method itself: code compiled for a layer has no place for the changes of adapters."""
        self._method = method
        self._backend: Callable[..., Any] = torch._dynamo.lookup_backend(backend)
        # torch.compile stores code by code object, up to a limit: every model gets a code object of its own.
        own = FunctionType(method.__code__.replace(), method.__globals__, method.__name__, closure=method.__closure__)
        # fullgraph: code that cannot be compiled, and more compilations than allowed, raise instead of running eagerly.
        self._compiled = torch.compile(own, fullgraph=True, dynamic=False, backend=self._compile)

    def __call__(self, block: nn.Module, rows: Tensor, *tokens: Tokens) -> Any:
        if self.is_eager or any(len(x) < 2 for x in _tensors(tokens)):
            return self._method(block, rows, *tokens)
        if rows.shape[1] > 1:
            torch._dynamo.mark_dynamic(rows, 1)
        return self._compiled(block, rows, *map(_sized_freely, tokens))

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


def _tensors(tokens: Sequence[Tokens]) -> list[Tensor]:
    """All tensors in the arguments of a part."""
    nested = (x if isinstance(x, tuple) else (x,) for x in tokens)
    return [x for x in chain.from_iterable(nested) if x is not None]


def _sized_freely(x: Tokens) -> Tokens:
    """x with the first dim of each tensor marked as dynamic, so that its size is an input of the compiled code."""
    if x is None:
        return None
    if isinstance(x, tuple):
        marked: tuple[Any, ...] = x._make(map(_sized_freely, x))  # type: ignore[attr-defined]  # a named tuple
        return marked
    if x.storage_offset():  # rare; code compiled for an offset would serve no other tensor
        x = x.clone()
    torch._dynamo.mark_dynamic(x, 0)
    return x


class CompiledBlocks:
    """Compiled methods of blocks of one class; the blocks use them from construction on."""

    def __init__(self, blocks: Sequence[nn.Module], names: Sequence[str], backend: Backend) -> None:
        """names: methods of the blocks to compile, see `CompiledPart`; the rest of a block runs eagerly.

        Blocks whose layers are of different classes have code of their own: a file may store some layers in float8.
        """
        kinds: dict[tuple[type, ...], list[nn.Module]] = {}
        for block in blocks:
            kinds.setdefault(tuple(map(type, block.modules())), []).append(block)
        self.parts = []
        for members in kinds.values():
            for name in names:
                part = CompiledPart(getattr(type(members[0]), name), backend)
                self.parts.append(part)
                for block in members:
                    setattr(block, name, MethodType(part, block))

    @property
    def num_compilations(self) -> int:
        return sum(part.num_compilations for part in self.parts)

    def set_eager(self, is_eager: bool) -> None:
        """Run the methods themselves from now on, or the compiled code again."""
        for part in self.parts:
            part.is_eager = is_eager

    def end_warm_up(self) -> None:
        for part in self.parts:
            part.is_warm = True

    def __str__(self) -> str:
        return ", ".join(f"{part.name} ({part.num_compilations} variants)" for part in self.parts)
