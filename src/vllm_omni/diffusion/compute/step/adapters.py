"""Adapters of the sequences of a step: which rows of which layers each adapter changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import torch

from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.layers.low_rank import (
    Adaptable,
    AdaptedLayer,
    ChangedRows,
    LayerChange,
    LayerWeights,
    RowRange,
    TorchChange,
)
from vllm_omni.diffusion.compute.packing import MembershipCache, Pack, TokenRanges
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

    def __init__(self, transformer: PackedTransformer, changes: Mapping[str, LayerChange]) -> None:
        """changes: by path of the layer."""
        self._compiled = transformer.compiled
        self._changes = [(_layer(transformer, path), change) for path, change in changes.items()]

    @classmethod
    def of_all_rows(cls, transformer: PackedTransformer, index: int, composition: Composition) -> Self:
        """Changes for what is computed for one composition alone: texts and rows of modulation.

        index: of the transformer in the model.
        """
        parts: dict[str, list[tuple[ChangedRows, LayerWeights]]] = {}
        for adapter, scale in composition:
            rows = ChangedRows(slice(None), scale)
            for path, weights in adapter.layers[index].items():
                parts.setdefault(path, []).append((rows, weights))
        return cls(transformer, {path: TorchChange(its) for path, its in parts.items()})

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


def _layer(transformer: PackedTransformer, path: str) -> Adaptable:
    return cast(Adaptable, transformer.get_submodule(path))


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

    def __contains__(self, adapter: LoadedAdapter) -> bool:
        return any(its is adapter for composition in self._compositions for its, _ in composition)

    def _make_layers(self) -> ChangedLayers:
        transformer = self._transformer
        parts: dict[str, list[tuple[LayerWeights, tuple[RowRange, ...]]]] = {}
        tokens: dict[str, TokenRanges] = {}
        made: dict[tuple[LoadedAdapter, TokenRanges], tuple[RowRange, ...]] = {}
        for adapter in dict.fromkeys(adapter for its in self._compositions for adapter, _ in its):
            for path, weights in adapter.layers[self._index].items():
                its = tokens.setdefault(path, transformer.adapted_tokens(path, self._pack))
                key = adapter, its
                if key not in made:
                    made[key] = tuple(self._ranges(adapter, its))
                parts.setdefault(path, []).append((weights, made[key]))
        layers = [
            AdaptedLayer(its, tokens[path].num_rows, len(_layer(transformer, path).weight), tokens[path].gaps)
            for path, its in parts.items()
        ]
        changes = transformer.kernels.layer_changes(layers, self._pack.text_sequence.device)
        return ChangedLayers(transformer, dict(zip(parts, changes, strict=True)))

    def _ranges(self, adapter: LoadedAdapter, tokens: TokenRanges) -> Iterator[RowRange]:
        """Rows of the sequences that have the adapter."""
        for (start, stop), composition in zip(tokens.ranges, self._compositions, strict=True):
            if adapter in (scales := dict(composition)):
                yield RowRange(start, stop, scales[adapter])
