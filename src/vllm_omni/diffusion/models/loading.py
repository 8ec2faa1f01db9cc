"""Weights from safetensors files into modules, one tensor at a time: nothing is held twice or unpickled, and of
a module that ranks share each reads its part alone. Or random weights in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vllm_omni.diffusion.data import LoadFormat
from vllm_omni.diffusion.layers.fp8 import Fp8ColumnLinear, keep_in_float8
from vllm_omni.diffusion.layers.linear import Sharded
from vllm_omni.diffusion.layers.rounding import quantize
from vllm_omni.diffusion.models.dummy import dummy_weight
from vllm_omni.diffusion.weight_files import checked_files, component_variant
from vllm_omni.errors import ConfigError

OnBytes = Callable[[int], object]
"""Told how many bytes of weights were read since the last call."""


def weight_names(folder: Path, variant: str | None = None) -> Iterator[str]:
    """Names in a component's files, read from their headers."""
    for file in checked_files(folder, variant):
        with safe_open(file, framework="pt") as weights:
            yield from weights.keys()


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
) -> None:
    """Move `module`, built on the meta device, to `device` and fill it from the checkpoint in `folder`.

    Modules that are `Sharded` read their rank's share alone. names: see `checkpoint_slots`. prefix: what the names of
    the module's weights begin with in the checkpoint; weights of other names are not read. unread: nor are those whose
    name goes on with one of these. float8: the last names of the layers whose weights are kept in float8, rounded as
    they are read. With the format `dummy` no file is read. variant: see `choose_names`.
    Raises ConfigError when the checkpoint lacks a weight, has
    one too many, or one of another shape, and when `device` does not compute the float8 layers.
    """
    nn.Module.to(module, dtype)  # diffusers' own `to` warns of every dtype
    keep_in_float8(module, float8, device)
    module.to_empty(device=device)
    slots = checkpoint_slots(module, names)
    if load_format == "dummy":
        for name, slot in slots.items():
            on_bytes(slot.fill(dummy_weight(name, slot.whole_shape, dtype, device)))
    else:
        files = checked_files(folder, variant)
        _read_weights({prefix + name: slot for name, slot in slots.items()}, files, on_bytes, prefix, unread, device)
    module.requires_grad_(False).eval()


def _read_weights(
    slots: dict[str, Slot],
    files: Sequence[Path],
    on_bytes: OnBytes,
    prefix: str,
    unread: tuple[str, ...],
    device: torch.device,
) -> None:
    """Fill and empty `slots`."""
    for file in files:
        with safe_open(file, framework="pt", device=str(device)) as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                if not name.startswith(prefix) or name.removeprefix(prefix).startswith(unread):
                    continue
                if name not in slots:
                    raise ConfigError(f"{file} has a weight that the model does not take: {name}")
                stored, slot = weights.get_slice(name), slots.pop(name)
                if (shape := tuple(stored.get_shape())) != slot.whole_shape:
                    raise ConfigError(f"{file}: {name} has shape {shape}, expected {slot.whole_shape}")
                on_bytes(slot.fill(stored))
    if slots:
        raise ConfigError(
            f"{files[0].parent} lacks {len(slots)} weights of the model, among them {', '.join(list(slots)[:3])}"
        )


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
    files = checked_files(folder, variant)
    chosen = component_variant(folder, variant)  # diffusers refuses a variant that the component lacks
    vae = cls.from_pretrained(folder, dtype=dtype, use_safetensors=True, variant=chosen)
    on_bytes(sum(file.stat().st_size for file in files))
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
