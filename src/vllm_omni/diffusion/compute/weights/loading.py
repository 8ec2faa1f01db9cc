"""Loading of safetensors files into modules, one tensor at a time, so that no weight is held twice.

Each rank reads only its shard of a module that ranks share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vllm_omni.diffusion.catalog.expected_weights import check_none_missing
from vllm_omni.diffusion.catalog.model_index import DIFFUSERS_STEMS, STEMS, Stems
from vllm_omni.diffusion.catalog.weight_files import (
    StoredWeight,
    check_types,
    component_variant,
    safetensors_files,
    stored_weights,
)
from vllm_omni.diffusion.compute.layers.fp8 import Fp8ColumnLinear, keep_in_float8
from vllm_omni.diffusion.compute.layers.linear import KeepsFloat32, Sharded
from vllm_omni.diffusion.compute.layers.rounding import quantize
from vllm_omni.diffusion.compute.weights.stored_shapes import check_stored_shapes
from vllm_omni.diffusion.data import LoadFormat
from vllm_omni.errors import ConfigError, error_line

DUMMY_STD = 0.02
"""Standard deviation of dummy weights."""
Allocate = Callable[[nn.Module], object]
"""Callback that allocates the memory of a module on the meta device."""
OnBytes = Callable[[int], object]
"""Callback with the number of weight bytes read since its last call."""


def weight_names(folder: Path, variant: str | None = None, stems: Stems = STEMS) -> list[str]:
    """Names of the weights in the files of a component, from the file headers."""
    return list(stored_weights(folder, variant, stems))


def reads_files(load_format: LoadFormat, device: torch.device) -> bool:
    """Whether weights come from files: not with `dummy`, nor on the meta device, where modules have no memory."""
    return load_format == "auto" and device.type != "meta"


@dataclass(frozen=True)
class WeightTarget:
    """Destination of a tensor of the checkpoint, and the shard of the tensor that goes there."""

    tensor: Tensor
    cut_dim: int | None = None
    """Dim that is cut into `num_ranks` equal shards, of which `rank` is read; None: the whole tensor is read."""
    rank: int = 0
    num_ranks: int = 1
    scale: Tensor | None = None
    """Destination of the scales when `tensor` is float8, float32 [rows of `tensor`, 1]; None: no float8."""

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape that the checkpoint must have."""
        return tuple(n * self.num_ranks if dim == self.cut_dim else n for dim, n in enumerate(self.tensor.shape))

    def device_to_read(self, device: torch.device) -> torch.device:
        """Device to which the file is read. device: that of the model, which also rounds for weights in host memory."""
        return device if self.scale is not None else self.tensor.device

    def fill(self, stored: Any) -> int:
        """Read this shard of `stored`, a tensor or a slice of a safetensors file. Returns the bytes read."""
        share = [slice(self.rank * n, (self.rank + 1) * n) for n in self.tensor.shape]
        part: Tensor = stored[tuple(cut if dim == self.cut_dim else slice(None) for dim, cut in enumerate(share))]
        if self.scale is None:
            self.tensor.copy_(part)
        else:
            for destination, source in zip((self.tensor, self.scale), quantize(part), strict=True):
                destination.copy_(source)
        return part.nbytes


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
    unread_ends: tuple[str, ...] = (),
    allocate: Allocate | None = None,
) -> None:
    """Move `module`, built on the meta device, to `device` and fill it from the checkpoint in `folder`.

    `Sharded` modules read the shard of their rank. names: see `weight_targets`. prefix: start of the names of the
    module's weights in the checkpoint; other weights are not read. unread: starts of names, after the prefix, of
    further weights that are not read; unread_ends: ends of their names. float8: last names of the layers whose weights
    are rounded to float8 when they are read. load_format: with `dummy` no file is read. variant, stems: see
    `choose_names`. allocate: puts some of the weights elsewhere than on `device`; None: all are there.
    On the meta device `module` gets the shapes and dtypes that it would have elsewhere, and no weight.
    Raises ConfigError, before it reads a weight, when the checkpoint lacks a weight or has one that the module lacks,
    or one with another shape or without a floating-point type; also when `device` does not support float8 layers.
    """
    nn.Module.to(module, dtype)  # the `to` of diffusers warns about any dtype
    _widen_float32(module)
    keep_in_float8(module, float8, device)
    if allocate is None:
        module.to_empty(device=device)
    else:
        allocate(module)
    module.requires_grad_(False).eval()
    if device.type == "meta":
        return
    targets = weight_targets(module, names)
    if load_format == "dummy":
        for name, target in targets.items():
            on_bytes(target.fill(dummy_weight(name, target.whole_shape, dtype, device)))
    else:
        stored = {
            name: weight
            for name, weight in stored_weights(folder, variant, stems).items()
            if name.startswith(prefix)
            and not name.removeprefix(prefix).startswith(unread)
            and not name.endswith(unread_ends)
        }
        targets = {prefix + name: target for name, target in targets.items()}
        _check_fit(targets, stored, folder)
        for file, members in groupby(stored, lambda name: stored[name].file):
            with ExitStack() as stack:
                opened: dict[torch.device, Any] = {}
                for name in members:
                    target = targets[name]
                    if (where := target.device_to_read(device)) not in opened:
                        reader = safe_open(folder.parent / file, framework="pt", device=str(where))
                        opened[where] = stack.enter_context(reader)
                    on_bytes(target.fill(opened[where].get_slice(name)))


def _widen_float32(module: nn.Module) -> None:
    """Widen the parameters that `KeepsFloat32` names; `module` is on the meta device."""
    for owner in module.modules():
        if isinstance(owner, KeepsFloat32):
            for name in owner.float32_parameters:
                parameter: nn.Parameter = getattr(owner, name)
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def _check_fit(targets: Mapping[str, WeightTarget], stored: Mapping[str, StoredWeight], folder: Path) -> None:
    """Raise ConfigError with the first difference between `stored` and `targets`."""
    for name, weight in stored.items():
        if name not in targets:
            raise ConfigError(f"{weight.file} has a weight that the model does not take: {name}")
        if weight.shape != (expected := targets[name].whole_shape):
            raise ConfigError(f"{weight.file}: {name} has shape {weight.shape}, expected {expected}")
    check_none_missing(folder.name, [name for name in targets if name not in stored])
    check_types(folder.name, stored)


def load_autoencoder(
    cls: Any,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    on_bytes: OnBytes,
    load_format: LoadFormat,
    variant: str | None = None,
) -> Any:
    """Load diffusers' autoencoder of class `cls`: on the CPU, or on `device` where no file is read (`reads_files`)."""
    if not reads_files(load_format, device):
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
    except Exception as error:  # a config with wrong values may raise anything
        raise ConfigError(f"{folder.name}/: diffusers cannot load the {cls.__name__}: {error_line(error)}") from error
    # diffusers fills missing weights with random numbers and only logs a warning.
    check_none_missing(folder.name, sorted(differences["missing_keys"]))
    if unexpected := sorted(differences["unexpected_keys"]):
        raise ConfigError(f"{folder.name}/ has a weight that the model does not take: {unexpected[0]}")
    on_bytes(sum(file.stat().st_size for file in safetensors_files(folder, variant, DIFFUSERS_STEMS)))
    return vae.requires_grad_(False).eval()


def weight_targets(module: nn.Module, names: Mapping[str, tuple[str, ...]]) -> dict[str, WeightTarget]:
    """Target of each weight, by its name in the checkpoint.

    names: for a module that holds several modules of the checkpoint, concatenated along dim 0 (or their shards): the
    end of its name -> their names. Other modules have the same name in the checkpoint.
    """
    targets = {}
    for full_name, parameter in module.named_parameters():
        path, _, kind = full_name.rpartition(".")
        theirs = checkpoint_modules(path, names)
        owner = module.get_submodule(path)
        scales: Sequence[Tensor | None] = [None] * len(theirs)
        if isinstance(owner, Fp8ColumnLinear) and kind == "weight":
            scales = owner.scale.chunk(len(theirs))
        for name, part, scale in zip(theirs, parameter.data.chunk(len(theirs)), scales, strict=True):
            if isinstance(owner, Sharded) and kind in owner.cut_dims:
                target = WeightTarget(part, owner.cut_dims[kind], owner.group.rank, owner.group.size, scale)
            else:
                target = WeightTarget(part, scale=scale)
            # A parameter of `module` itself has an empty path.
            targets[f"{name}.{kind}".removeprefix(".")] = target
    return targets


def checkpoint_modules(path: str, names: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Names of the modules of the checkpoint that the module `path` holds, in order. names: see `weight_targets`."""
    ours = next((name for name in names if path == name or path.endswith("." + name)), path)
    prefix = path.removesuffix(ours)
    return tuple(prefix + name for name in names.get(ours, (ours,)))


def dummy_weight(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random weight of `--load-format dummy`: normal, with mean 0, but 1 for the scale of a norm.

    It depends on its name in the checkpoint, its full shape, its dtype and the kind of device. So every run has the
    same weights, and the shards of all ranks are parts of the same weight.
    """
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())
    noise = torch.empty(shape, dtype=dtype, device=device)
    noise.normal_(std=DUMMY_STD, generator=torch.Generator(device).manual_seed(seed))
    is_vector = max(shape, default=1) == noise.numel()
    return noise.add_(1.0) if is_vector and name.endswith((".weight", ".gamma")) else noise
