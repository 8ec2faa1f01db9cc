"""Weights from safetensors files into modules, one tensor at a time: nothing is held twice or unpickled, and of
a module that ranks share each reads its part alone. Or random weights in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vllm_omni.diffusion.catalog.expected_weights import check_none_missing
from vllm_omni.diffusion.catalog.model_index import DIFFUSERS_STEMS, STEMS, Stems
from vllm_omni.diffusion.catalog.weight_files import component_variant, safetensors_files
from vllm_omni.diffusion.catalog.weight_headers import StoredWeight, check_types, stored_weights
from vllm_omni.diffusion.compute.layers.fp8 import Fp8ColumnLinear, keep_in_float8
from vllm_omni.diffusion.compute.layers.linear import Sharded
from vllm_omni.diffusion.compute.layers.rounding import quantize
from vllm_omni.diffusion.compute.weights.dummy import dummy_weight
from vllm_omni.diffusion.compute.weights.stored_shapes import check_stored_shapes
from vllm_omni.diffusion.data import LoadFormat
from vllm_omni.errors import ConfigError, error_line

OnBytes = Callable[[int], object]
"""Told how many bytes of weights were read since the last call."""


def weight_names(folder: Path, variant: str | None = None, stems: Stems = STEMS) -> list[str]:
    """Names in a component's files, read from their headers."""
    return list(stored_weights(folder, variant, stems))


@dataclass(frozen=True)
class Slot:
    """Where a tensor of the checkpoint goes, and which part of it."""

    target: Tensor
    cut_dim: int | None = None
    """The dim of which only the share `rank` of `num_ranks` equal ones is taken; None: all of the tensor."""
    rank: int = 0
    num_ranks: int = 1
    scale: Tensor | None = None
    """float32 [rows of the target, 1]: of a target in float8, that of each row; None: the target is as stored."""

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """What the checkpoint must have."""
        return tuple(n * self.num_ranks if dim == self.cut_dim else n for dim, n in enumerate(self.target.shape))

    def fill(self, stored: Any) -> int:
        """Read from `stored`, a tensor or its slice of a safetensors file, what this slot takes -> its bytes."""
        part: Tensor = stored[self._taken()]
        if self.scale is None:
            self.target.copy_(part)
        else:
            for target, source in zip((self.target, self.scale), quantize(part), strict=True):
                target.copy_(source)
        return part.nbytes

    def _taken(self) -> tuple[slice, ...]:
        share = [slice(self.rank * n, (self.rank + 1) * n) for n in self.target.shape]
        return tuple(part if dim == self.cut_dim else slice(None) for dim, part in enumerate(share))


def load_weights(
    module: nn.Module,
    folder: Path,
    names: Mapping[str, tuple[str, ...]],
    device: torch.device,
    dtype: torch.dtype,
    on_bytes: OnBytes = lambda count: None,
    prefix: str = "",
    unread: tuple[str, ...] = (),
    float8: tuple[str, ...] = (),
    load_format: LoadFormat = "auto",
    variant: str | None = None,
    stems: Stems = STEMS,
) -> None:
    """Move `module`, built on the meta device, to `device` and fill it from the checkpoint in `folder`.

    Modules that are `Sharded` read their rank's share alone. names: see `checkpoint_slots`. prefix: what the names of
    the module's weights begin with in the checkpoint; weights of other names are not read. unread: nor are those whose
    name goes on with one of these. float8: the last names of the layers whose weights are kept in float8, rounded as
    they are read. With the format `dummy` no file is read. variant, stems: see `choose_names`.
    Raises ConfigError when the checkpoint lacks a weight, has one too many, or one of another shape or of no
    floating-point type, before it reads any; and when `device` does not compute the float8 layers.
    """
    nn.Module.to(module, dtype)  # diffusers' own `to` warns of every dtype
    keep_in_float8(module, float8, device)
    module.to_empty(device=device)
    slots = checkpoint_slots(module, names)
    if load_format == "dummy":
        for name, slot in slots.items():
            on_bytes(slot.fill(dummy_weight(name, slot.whole_shape, dtype, device)))
    else:
        stored = {
            name: weight
            for name, weight in stored_weights(folder, variant, stems).items()
            if name.startswith(prefix) and not name.removeprefix(prefix).startswith(unread)
        }
        slots = {prefix + name: slot for name, slot in slots.items()}
        _check_fit(slots, stored, folder)
        _read_weights(slots, stored, folder.parent, on_bytes, device)
    module.requires_grad_(False).eval()


def _check_fit(slots: Mapping[str, Slot], stored: Mapping[str, StoredWeight], folder: Path) -> None:
    """Raise ConfigError, with the first difference, where `stored` is not what `slots` take."""
    for name, weight in stored.items():
        if name not in slots:
            raise ConfigError(f"{weight.file} has a weight that the model does not take: {name}")
        if weight.shape != (expected := slots[name].whole_shape):
            raise ConfigError(f"{weight.file}: {name} has shape {weight.shape}, expected {expected}")
    check_none_missing(folder.name, [name for name in slots if name not in stored])
    check_types(folder.name, stored)


def _read_weights(
    slots: Mapping[str, Slot],
    stored: Mapping[str, StoredWeight],
    root: Path,
    on_bytes: OnBytes,
    device: torch.device,
) -> None:
    """Fill `slots` from the files in the model folder `root`."""
    for file, names in groupby(stored, lambda name: stored[name].file):
        with safe_open(root / file, framework="pt", device=str(device)) as weights:
            for name in names:
                on_bytes(slots[name].fill(weights.get_slice(name)))


def load_autoencoder(
    cls: Any,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    on_bytes: OnBytes,
    load_format: LoadFormat,
    variant: str | None = None,
) -> Any:
    """diffusers' autoencoder of the class `cls`; what of it is not needed can go before it is moved to `device`."""
    if load_format == "dummy":
        with torch.device("meta"):
            vae = cls.from_config(cls.load_config(folder))
        load_weights(vae, folder, {}, device, dtype, on_bytes, load_format=load_format)
        return vae
    stored = stored_weights(folder, variant, DIFFUSERS_STEMS)
    check_types(folder.name, stored)
    check_stored_shapes(cls, folder, stored)
    chosen = component_variant(folder, variant, DIFFUSERS_STEMS)  # diffusers refuses a variant that the component lacks
    try:
        vae, differences = cls.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, variant=chosen, output_loading_info=True
        )
    except Exception as error:  # a config of wrong values ends in errors of any class
        raise ConfigError(f"{folder.name}/: diffusers cannot load the {cls.__name__}: {error_line(error)}") from error
    # diffusers leaves weights that are not there random, and tells so in the log alone.
    check_none_missing(folder.name, sorted(differences["missing_keys"]))
    if unexpected := sorted(differences["unexpected_keys"]):
        raise ConfigError(f"{folder.name}/ has a weight that the model does not take: {unexpected[0]}")
    on_bytes(sum(file.stat().st_size for file in safetensors_files(folder, variant, DIFFUSERS_STEMS)))
    return vae.requires_grad_(False).eval()


def checkpoint_slots(module: nn.Module, names: Mapping[str, tuple[str, ...]]) -> dict[str, Slot]:
    """Checkpoint name -> the part of a parameter that holds it.

    `names` maps a module's name, or the end of it, to the checkpoint's modules that it holds one after another
    along dim 0 (of a `Sharded` one: the share of each); other modules have their own names in the checkpoint.
    """
    return dict(_slots(module, names))


def _slots(module: nn.Module, names: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Slot]]:
    for full_name, parameter in module.named_parameters():
        path, _, kind = full_name.rpartition(".")
        ours = next((name for name in names if path == name or path.endswith("." + name)), path)
        theirs = names.get(ours, (ours,))
        prefix = path.removesuffix(ours)
        owner = module.get_submodule(path)
        scales: Sequence[Tensor | None] = [None] * len(theirs)
        if isinstance(owner, Fp8ColumnLinear) and kind == "weight":
            scales = owner.scale.chunk(len(theirs))
        for name, part, scale in zip(theirs, parameter.data.chunk(len(theirs)), scales, strict=True):
            if isinstance(owner, Sharded) and kind in owner.cut_dims:
                slot = Slot(part, owner.cut_dims[kind], owner.group.rank, owner.group.size, scale)
            else:
                slot = Slot(part, scale=scale)
            # A parameter of the module itself has no path.
            yield f"{prefix}{name}.{kind}".removeprefix("."), slot
