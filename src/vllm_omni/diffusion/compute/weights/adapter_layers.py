"""Weights of adapter files for the layers of packed transformers, each rank with its shard."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.layers.linear import Sharded
from vllm_omni.diffusion.compute.layers.low_rank import Adaptable, LayerWeights, UpWeight
from vllm_omni.diffusion.compute.layers.rounding import FLOAT8
from vllm_omni.diffusion.compute.step.adapters import LoadedAdapter
from vllm_omni.diffusion.compute.step.transformer import PackedTransformer
from vllm_omni.diffusion.compute.weights.adapter_digest import adapter_digest
from vllm_omni.diffusion.compute.weights.adapter_file import (
    AdapterFile,
    AdapterFileError,
    LowRank,
    find_layer,
    flat_name,
    listed,
)
from vllm_omni.diffusion.compute.weights.loading import checkpoint_modules
from vllm_omni.inputs.adapter_files import AdapterPaths

logger = logging.getLogger(__name__)

COMPONENTS = ("transformer", "transformer_2")
"""Components of a model folder that are a packed family's transformers, in order."""
TEXT_ENCODER_STARTS = ("text_encoder", "lora_te", "te_", "te1_", "te2_", "te3_")
"""Starts of the flat names of a text encoder's layers."""
FUSED_NAMES = {
    ("to_q", "to_k", "to_v"): "to_qkv",
    ("to_k", "to_v"): "to_kv",
    ("add_q_proj", "add_k_proj", "add_v_proj"): "to_added_qkv",
    ("add_k_proj", "add_v_proj"): "to_added_kv",
}
"""Projections of an attention -> name of the one layer that `fuse_projections` of diffusers makes of them."""
_IN_BLOCK = re.compile(r"[._]\d+[._]")
"""Number of a block within the name of a layer, in the model and in any file."""
MAX_RANK = 1024
"""Largest rank of a layer. Larger ones cost more than the layers themselves."""
TOLERANCE = 1e-3
"""Largest relative difference of the energies of a file and of its conversion."""

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Conversion of the weights of an adapter to the names of diffusers; raises anything."""


@dataclass(frozen=True)
class LayerTarget:
    """Place of a layer of the checkpoint in the transformers."""

    index: int
    """Number of the transformer."""
    path: str
    """Path of the module in the transformer."""
    layer: Adaptable
    part: int
    """Number of the layer among those that the module holds side by side."""
    num_parts: int

    @property
    def outputs(self) -> int:
        """Outputs on this rank."""
        return self.layer.weight.shape[0] // self.num_parts

    @property
    def inputs(self) -> int:
        """Inputs on this rank."""
        return self.layer.weight[0].numel()

    def num_cuts(self, dim: int) -> int:
        """Number of ranks that share the weight along this dim."""
        if isinstance(self.layer, Sharded) and self.layer.cut_dims.get("weight") == dim:
            return self.layer.group.size
        return 1

    def share(self, dim: int) -> slice:
        """This rank's part of the outputs (dim 0) or inputs (dim 1)."""
        length = self.inputs if dim else self.outputs
        rank = self.layer.group.rank if isinstance(self.layer, Sharded) and self.num_cuts(dim) > 1 else 0
        return slice(rank * length, (rank + 1) * length)


def layer_targets(transformers: Sequence[PackedTransformer]) -> dict[str, LayerTarget]:
    """Layers that adapters may change, by `component.layer` with diffusers' name of the layer."""
    targets = {}
    for index, transformer in enumerate(transformers):
        for path, module in transformer.named_modules():
            if isinstance(module, Adaptable):
                names = checkpoint_modules(path, transformer.checkpoint_names)
                for part, name in enumerate(names):
                    targets[f"{COMPONENTS[index]}.{name}"] = LayerTarget(index, path, module, part, len(names))
    return targets


def fused_layers(targets: Mapping[str, LayerTarget]) -> dict[str, list[str]]:
    """Layers that other code has in one, such as `attention.qkv` or `attn.to_added_qkv` -> their parts, in order.

    Such a name is beside the parts: the one that the transformer's own module has, and the one that diffusers gives to
    fused projections. A name that two modules have, such as `attn.qkv` for the two streams of a block, is left out.
    """
    by_module: dict[tuple[int, str], list[str]] = {}
    for name, target in targets.items():
        by_module.setdefault((target.index, target.path), []).append(name)
    found: dict[str, list[list[str]]] = {}
    for (_, path), parts in by_module.items():
        if len(parts) == 1:
            continue
        block = parts[0].rpartition(".")[0]
        own = path.rpartition(".")[2]
        of_diffusers = FUSED_NAMES.get(tuple(part.rpartition(".")[2] for part in parts), own)
        for name in {own, of_diffusers}:
            found.setdefault(f"{block}.{name}", []).append(parts)
    return {name: modules[0] for name, modules in found.items() if len(modules) == 1}


def _by_flat_name(names: Iterable[str], trainer_names: Mapping[str, str]) -> dict[str, str]:
    """Flat name of each layer -> its name; also by its name in the model's own code."""
    found: dict[str, str] = {}
    for name in names:
        own = name
        for part, replacement in trainer_names.items():
            own = own.replace(part, replacement)
        found |= {flat_name(own): name, flat_name(name): name}
    return found


class AdapterReader:
    """Reads adapter files for the transformers of one model."""

    def __init__(
        self,
        transformers: Sequence[PackedTransformer],
        convert: Convert | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """convert: diffusers' conversion for the family; None: it has none. dtype: of inputs of float8 layers."""
        self._transformers = transformers
        self._targets = layer_targets(transformers)
        self._fused = fused_layers(self._targets)
        trainer_names = {name: own for each in transformers for name, own in each.trainer_names.items()}
        self._names = _by_flat_name((*self._targets, *self._fused), trainer_names)
        self._convert = convert
        self._dtype = dtype
        self._device = device

    def read(self, paths: AdapterPaths) -> LoadedAdapter:
        """This rank's weights of an adapter. Raises AdapterFileError unless the model takes what the file holds.

        Layers that the model lacks are left out with a warning if it has others.
        """
        contents = AdapterFile.read(paths, self._check_outline)
        _refuse_others(contents)
        found, missing = self._find(contents)
        if not found:
            raise AdapterFileError(
                f"no layer here has the name of one of its layers; it has {listed(missing)}, "
                f"the model {listed(list(self._targets))}"
            )
        if not _in_blocks(found) and (lacking := _in_blocks(missing)):  # another family's, with a layer of a usual name
            raise AdapterFileError(
                f"the model has none of its layers inside blocks; it has {listed(lacking)}, the model "
                f"{listed(_in_blocks(self._targets))}; outside of blocks both have {listed(list(found))}"
            )
        if missing:
            logger.warning(
                "the LoRA adapter %s: %d of its %d layers are not in this model and left out: %s",
                paths.name,
                len(missing),
                len(missing) + len(found),
                listed(missing),
            )
        return self._loaded(found, adapter_digest(contents))

    def _check_outline(self, contents: AdapterFile) -> None:
        """Raise AdapterFileError for shapes that do not fit the model. contents: without values.

        Names that need diffusers' conversion are checked after it, which needs the values.
        """
        _refuse_others(contents)
        found, missing = self._look_up(contents)
        if not missing:
            for name, change in found.items():
                _check_shapes(name, self._targets[name], change)

    def _find(self, contents: AdapterFile) -> tuple[dict[str, LowRank], list[str]]:
        """Changes by name of the layer, and the names in the file of those without a layer.

        The file's names are looked up first; diffusers' conversion knows other trainers' names.
        """
        found, missing = self._look_up(contents)
        if not missing:
            return found, missing
        converted = self._converted(contents)
        again, still_missing = ({}, missing) if converted is None else self._look_up(converted)
        return (again, still_missing) if len(again) > len(found) else (found, missing)

    def _look_up(self, contents: AdapterFile) -> tuple[dict[str, LowRank], list[str]]:
        found: dict[str, LowRank] = {}
        missing = []
        for change in contents.changes:
            assert isinstance(change, LowRank)
            name = find_layer(change.layer, self._names)
            if name is None:
                missing.append(change.layer)
                continue
            for part, its in self._parts(name, change):
                if part in found:
                    raise AdapterFileError(f"two of its layers are {part}: {found[part].layer} and {change.layer}")
                found[part] = its
        return found, missing

    def _parts(self, name: str, change: LowRank) -> list[tuple[str, LowRank]]:
        """Changes of the layers that the layer `name` consists of; most consist of themselves."""
        if (names := self._fused.get(name)) is None:
            return [(name, change)]
        down, up = change.weights
        if len(up) == 0 or len(up) % len(names):
            raise AdapterFileError(f"{name} has {len(names)} parts of equal size, its weight has {len(up)} outputs")
        chunks = up.chunk(len(names))
        return [(part, replace(change, weights=(down, chunk))) for part, chunk in zip(names, chunks, strict=True)]

    def _converted(self, contents: AdapterFile) -> AdapterFile | None:
        """The file with the names of diffusers; None if diffusers cannot convert all of it."""
        if self._convert is None:
            return None
        weights = contents.with_scales_in_weights(keeps_alphas=True).weights
        try:
            converted = AdapterFile(self._convert(dict(weights)), {})
            _refuse_others(converted)
            wanted, got = (sum(change.energy() for change in its.changes) for its in (contents, converted))
        except Exception:  # the conversions raise many classes for names that they do not know
            return None
        return converted if abs(wanted - got) <= TOLERANCE * wanted else None

    def _loaded(self, found: Mapping[str, LowRank], digest: str) -> LoadedAdapter:
        by_path: list[dict[str, list[tuple[LayerTarget, LowRank]]]] = [{} for _ in self._transformers]
        for name, change in found.items():
            target = self._targets[name]
            _check_shapes(name, target, change)
            by_path[target.index].setdefault(target.path, []).append((target, change))
        layers = tuple({path: self._weights(parts) for path, parts in paths.items()} for paths in by_path)
        modulates = tuple(
            any(name in transformer.modulation_layers for path in paths for name in path.split("."))
            for transformer, paths in zip(self._transformers, by_path)
        )
        return LoadedAdapter(layers, modulates, digest)

    def _weights(self, parts: Sequence[tuple[LayerTarget, LowRank]]) -> LayerWeights:
        """This rank's weights for one module. parts: the layers of the checkpoint that it holds."""
        dtype = parts[0][0].layer.weight.dtype
        dtype = self._dtype if dtype == FLOAT8 else dtype
        downs: list[Tensor] = []
        ups: list[UpWeight] = []
        first = 0
        for target, change in parts:
            down, up = (weight.flatten(1).float() for weight in change.weights)
            ranks = slice(first, first + len(down))
            columns = slice(target.part * target.outputs, (target.part + 1) * target.outputs)
            # All ranks check the whole weights, so that all of them refuse the same files.
            down, up = down.to(dtype), (up * change.scale).to(dtype)
            for key, weight in zip(change.keys, (down, up), strict=True):
                if not bool(weight.isfinite().all()):
                    raise AdapterFileError(f"{key} with its scale {change.scale:g} holds infinite values in {dtype}")
            # A clone, because a part of a tensor keeps all of it in memory.
            mine = up if target.num_cuts(0) == 1 else up[target.share(0)].clone()
            ups.append(UpWeight(columns, ranks, mine.to(self._device).contiguous()))
            downs.append(down[:, target.share(1)].to(self._device))
            first = ranks.stop
        return LayerWeights(torch.cat(downs), tuple(ups))


def _in_blocks(names: Iterable[str]) -> list[str]:
    """Names of layers that belong to a block."""
    return [name for name in names if _IN_BLOCK.search(name)]


def _refuse_others(contents: AdapterFile) -> None:
    """Raise AdapterFileError for weights that are no low-rank pair of a transformer's layer."""
    if others := list(contents.others):
        raise AdapterFileError(f"a packed family takes pairs of low-rank weights, got also {listed(others)}")
    if unused := contents.unused_alphas():
        raise AdapterFileError(f"these alphas belong to no weights: {listed(unused)}")
    for kind, keys in (
        ("LoKr weights", [change.layer for change in contents.changes if not isinstance(change, LowRank)]),
        (
            "changes of the text encoder",
            [c.layer for c in contents.changes if flat_name(c.layer).startswith(TEXT_ENCODER_STARTS)],
        ),
    ):
        if keys:
            raise AdapterFileError(f"a packed family takes no {kind}, got {listed(keys)}")


def _check_shapes(name: str, target: LayerTarget, change: LowRank) -> None:
    down, up = change.weights
    if (rank := down.shape[0]) > MAX_RANK:
        raise AdapterFileError(f"{name} has rank {rank}; ranks of 1 to {MAX_RANK} are taken")
    got = down[0].numel(), up.shape[0]
    wanted = target.inputs * target.num_cuts(1), target.outputs * target.num_cuts(0)
    if got != wanted or up[0].numel() != rank:
        raise AdapterFileError(
            f"{name} has {wanted[0]} inputs and {wanted[1]} outputs, its weights are {list(down.shape)} and "
            f"{list(up.shape)}"
        )


def diffusers_conversion(loader_class: str) -> Convert:
    """Conversion by a class of `diffusers.loaders.lora_pipeline`."""

    def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        from diffusers.loaders import lora_pipeline

        cls: Any = getattr(lora_pipeline, loader_class)
        converted: dict[str, Tensor] = cls.lora_state_dict(weights)
        return converted

    return convert
