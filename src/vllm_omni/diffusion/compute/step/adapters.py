"""Adapters of the sequences of a step: which rows of which layers each adapter changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.layers.low_rank import Adaptable, ChangedRows, LayerChange, LayerWeights
from vllm_omni.diffusion.compute.packing import MembershipCache, Offsets, Pack
from vllm_omni.diffusion.compute.step.modulation import Modulation

if TYPE_CHECKING:
    from vllm_omni.diffusion.compute.step.transformer import PackedTransformer

MAX_PARTS = 16
"""Parts kept of one pack; which sequences skip blocks together changes from step to step."""


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """Weights of one adapter on this rank; compared by identity."""

    layers: tuple[Mapping[str, LayerWeights], ...]
    """For each transformer of the model: path of a layer -> its weights."""
    modulates: tuple[bool, ...]
    """For each transformer: whether the adapter changes a layer that makes rows of modulation."""
    digest: str
    """Digest of the changes in the file, equal on all ranks."""

    @property
    def num_bytes(self) -> int:
        return sum(weights.num_bytes for its in self.layers for weights in its.values())

    def to(self, device: torch.device) -> LoadedAdapter:
        """Another adapter with the same weights on a device."""
        layers = tuple({path: weights.to(device) for path, weights in its.items()} for its in self.layers)
        return replace(self, layers=layers)


Composition = tuple[tuple[LoadedAdapter, float], ...]
"""Adapters of a request with their scales; empty: the model alone."""


class AdaptedCondition(NamedTuple):
    """All that a row of modulation depends on: the family's condition, and the adapters of the layers that make it."""

    condition: Any
    composition: Composition

    @classmethod
    def of(cls, index: int, condition: Any, composition: Composition) -> AdaptedCondition:
        """Condition with those adapters that change rows of modulation of the transformer `index`."""
        return cls(condition, tuple(its for its in composition if its[0].modulates[index]))


class ChangedLayers:
    """Changes of a transformer's layers, which the layers add while `applied` is entered."""

    def __init__(
        self,
        transformer: PackedTransformer,
        index: int,
        adapters: Sequence[LoadedAdapter],
        rows_of: Callable[[LoadedAdapter, str], ChangedRows],
    ) -> None:
        """index: of the transformer in the model. rows_of: rows that an adapter changes of the layer with this path."""
        self._compiled = transformer.compiled
        parts: dict[str, list[tuple[ChangedRows, LayerWeights]]] = {}
        for adapter in adapters:
            for path, weights in adapter.layers[index].items():
                parts.setdefault(path, []).append((rows_of(adapter, path), weights))
        self._changes = [
            (cast(Adaptable, transformer.get_submodule(path)), LayerChange(its)) for path, its in parts.items()
        ]

    @classmethod
    def of_all_rows(cls, transformer: PackedTransformer, index: int, composition: Composition) -> ChangedLayers:
        """Changes for what is computed for one composition alone: texts and rows of modulation."""
        rows = {adapter: ChangedRows(slice(None), scale) for adapter, scale in composition}
        return cls(transformer, index, list(rows), lambda adapter, path: rows[adapter])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the layers add their changes in the meantime. Blocks run uncompiled."""
        compiled = self._compiled if self._changes else None
        try:
            if compiled is not None:
                compiled.set_eager(True)
            for layer, change in self._changes:
                layer.change = change
            yield
        finally:
            for layer, _ in self._changes:
                # Back to the class's None: compiled code is guarded against attributes of the layer's own.
                vars(layer).pop("change", None)
            if compiled is not None:
                compiled.set_eager(False)


def modulate_adapted(transformer: PackedTransformer, index: int, conditions: Sequence[AdaptedCondition]) -> Modulation:
    """Rows of modulation of these conditions: see `PackedTransformer.modulate`. index: of the transformer."""
    by_composition: dict[Composition, list[int]] = {}
    for i, condition in enumerate(conditions):
        by_composition.setdefault(condition.composition, []).append(i)
    parts = []
    for composition, members in by_composition.items():
        with ChangedLayers.of_all_rows(transformer, index, composition).applied():
            parts.append(transformer.modulate([conditions[i].condition for i in members]))
    if len(parts) == 1:
        return parts[0]
    made = [i for members in by_composition.values() for i in members]
    order = to_device(torch.tensor(made).argsort(), parts[0].final.device)
    blocks, final = torch.cat([part.blocks for part in parts], dim=2), torch.cat([part.final for part in parts])
    return Modulation(blocks.index_select(2, order), final.index_select(0, order))


class PackAdapters:
    """Adapters of the sequences of one pack."""

    def __init__(
        self, transformer: PackedTransformer, index: int, pack: Pack, compositions: Sequence[Composition]
    ) -> None:
        """index: of the transformer in the model. compositions: that of each sequence."""
        self._transformer = transformer
        self._index = index
        self._pack = pack
        self._compositions = compositions
        self._layers: ChangedLayers | None = None
        self._parts: MembershipCache[PackAdapters] = MembershipCache(MAX_PARTS)

    def select(self, members: tuple[int, ...], pack: Pack) -> PackAdapters:
        """Adapters of some of the sequences, in order; made once. pack: that of these sequences."""
        compositions = [self._compositions[i] for i in members]
        return self._parts.get(members, lambda: PackAdapters(self._transformer, self._index, pack, compositions))

    @property
    def layers(self) -> ChangedLayers:
        if self._layers is None:
            self._layers = self._make_layers()
        return self._layers

    def _make_layers(self) -> ChangedLayers:
        transformer, pack = self._transformer, self._pack
        adapters = list(dict.fromkeys(adapter for its in self._compositions for adapter, _ in its))
        made: dict[tuple[LoadedAdapter, tuple[int, ...]], ChangedRows] = {}

        def rows_of(adapter: LoadedAdapter, path: str) -> ChangedRows:
            offsets = transformer.adapted_tokens(path, pack)
            key = adapter, offsets.values
            if key not in made:
                made[key] = self._rows(adapter, offsets)
            return made[key]

        return ChangedLayers(transformer, self._index, adapters, rows_of)

    def _rows(self, adapter: LoadedAdapter, offsets: Offsets) -> ChangedRows:
        """Rows of the sequences that have the adapter. A range where these sequences are neighbours."""
        members = [(i, dict(its)[adapter]) for i, its in enumerate(self._compositions) if adapter in dict(its)]
        device = offsets.cu_seqlens.device
        scales = [scale for _, scale in members]
        lengths = [offsets.lengths[i] for i, _ in members]
        scale: float | torch.Tensor = scales[0]
        if len(set(scales)) > 1:
            rows = torch.repeat_interleave(torch.tensor(scales), torch.tensor(lengths))
            scale = to_device(rows[:, None], device)
        first, last = members[0][0], members[-1][0]
        if last - first + 1 == len(members):
            return ChangedRows(slice(offsets.values[first], offsets.values[last + 1]), scale)
        ranges = [torch.arange(offsets.values[i], offsets.values[i + 1]) for i, _ in members]
        return ChangedRows(to_device(torch.cat(ranges), device), scale)
