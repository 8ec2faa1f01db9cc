"""Weights from safetensors files into modules, one tensor at a time: nothing is held twice, nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vllm_omni.errors import ConfigError

OnBytes = Callable[[int], object]
"""Told how many bytes of weights were read since the last call."""


def safetensors_files(folder: Path) -> list[Path]:
    """The files of a component, sharded or not. Raises ConfigError where there are none."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if missing := [file.name for file in files if not file.is_file()]:
        raise ConfigError(f"{folder} lacks {', '.join(missing)}")
    if not files:
        raise ConfigError(f"{folder} has no .safetensors file (other weight formats are not read)")
    return files


def load_weights(
    module: nn.Module,
    folder: Path,
    names: Mapping[str, tuple[str, ...]],
    device: torch.device,
    dtype: torch.dtype,
    on_bytes: OnBytes = lambda count: None,
) -> None:
    """Move `module`, built on the meta device, to `device` and fill it from the checkpoint in `folder`.

    names: see `checkpoint_slots`. Raises ConfigError when the checkpoint lacks a weight, has one too many, or
    one of another shape.
    """
    module.to(dtype).to_empty(device=device)
    slots = checkpoint_slots(module, names)
    for file in safetensors_files(folder):
        with safe_open(file, framework="pt", device=str(device)) as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                if name not in slots:
                    raise ConfigError(f"{file} has a weight that the model does not take: {name}")
                tensor, slot = weights.get_tensor(name), slots.pop(name)
                if tensor.shape != slot.shape:
                    raise ConfigError(f"{file}: {name} has shape {tuple(tensor.shape)}, expected {tuple(slot.shape)}")
                slot.copy_(tensor)
                on_bytes(tensor.nbytes)
    if slots:
        raise ConfigError(f"{folder} lacks {len(slots)} weights of the model, among them {', '.join(list(slots)[:3])}")
    module.requires_grad_(False).eval()


def checkpoint_slots(module: nn.Module, names: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Checkpoint name -> the part of a parameter that holds it.

    `names` maps a module's name, or the end of it, to the checkpoint's modules that it holds one after another
    along dim 0; other modules have their own names in the checkpoint.
    """
    return dict(_slots(module, names))


def _slots(module: nn.Module, names: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Tensor]]:
    for full_name, parameter in module.named_parameters():
        path, _, kind = full_name.rpartition(".")
        ours = next((name for name in names if path == name or path.endswith("." + name)), path)
        theirs = names.get(ours, (ours,))
        prefix = path.removesuffix(ours)
        for name, part in zip(theirs, parameter.data.chunk(len(theirs)), strict=True):
            yield f"{prefix}{name}.{kind}", part
