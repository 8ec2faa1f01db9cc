"""Weights of modules as one run of bytes, which can lie on the device or in host memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

ALIGNMENT = 256
"""Bytes to whose multiple each tensor is aligned, as PyTorch's allocator aligns them."""


@dataclass(frozen=True)
class _Place:
    """Place of one parameter or buffer in the run."""

    tensor: Tensor
    """The module's own tensor, whose `data` is replaced."""
    first: int
    """Number of its first byte."""


class FlatWeights:
    """Parameters and buffers of modules, laid out one after another in a run: uint8 [num_bytes].

    Tensors keep their shapes, dtypes and strides' order (contiguous or channels-last). A tensor that several modules
    share has one place. On the meta device the layout is known before memory is allocated.
    """

    def __init__(self, modules: Iterable[nn.Module], without: Iterable[Tensor] = ()) -> None:
        """without: parameters and buffers that are left where they are."""
        left_out = {id(tensor) for tensor in without}
        self._places: list[_Place] = []
        self.num_bytes = 0
        for tensor in _tensors(modules):
            if id(tensor) in left_out:
                continue
            left_out.add(id(tensor))
            self._places.append(_Place(tensor, self.num_bytes))
            size = tensor.numel() * tensor.element_size()
            self.num_bytes += -(-size // ALIGNMENT) * ALIGNMENT

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The modules' own tensors, in the order of the run."""
        return [place.tensor for place in self._places]

    def views(self, run: Tensor) -> list[Tensor]:
        """Parts of a run, shaped as the tensors. run: uint8 [num_bytes], contiguous and aligned."""
        return [_view(place, run) for place in self._places]

    def attach(self, run: Tensor) -> None:
        """Make the tensors parts of a run. Copies nothing: the run has the weights, or gets them later."""
        for place in self._places:
            place.tensor.data = _view(place, run)

    def save(self, run: Tensor) -> None:
        """Copy the weights, wherever they lie, into a run on any device."""
        for place, view in zip(self._places, self.views(run), strict=True):
            view.copy_(place.tensor.data, non_blocking=True)


def _tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        yield from chain(module.parameters(), module.buffers())


def _view(place: _Place, run: Tensor) -> Tensor:
    tensor = place.tensor
    size = tensor.numel() * tensor.element_size()
    flat = run[place.first : place.first + size].view(tensor.dtype)
    return flat.as_strided(tensor.shape, _dense_strides(tensor))


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of a tensor without gaps that keeps the order of `tensor`'s dims in memory."""
    return tuple(torch.empty_like(tensor, device="meta").stride())
