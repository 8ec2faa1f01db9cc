"""Check that a loaded adapter changes the model as its file describes.

diffusers converts the keys of an adapter and may drop some, or their alphas, with no more than a line in the log. The
check compares energies: the energy of a change is the sum of the squares of the values that it adds to a weight, which
stays the same when layers are renamed, split or reordered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from vllm_omni.diffusion.compute.weights.adapter_file import AdapterFile, LowRank, WeightChange

TOLERANCE = 1e-4
"""Largest relative difference of two energies that are equal, in float32."""
ROUGH_TOLERANCE = 5e-3
"""Largest relative difference of two equal energies where the model holds 16 bits a value."""


class Energies(NamedTuple):
    """Energy of all changes with the same matrix `down`: parts of one layer, such as queries, keys and values."""

    energy: float
    keys: list[str]


@torch.inference_mode()
def unplaced_keys(file: AdapterFile, models: Iterable[nn.Module], adapter: str) -> list[str]:
    """Keys of `file` that are not in the models, or at another scale. Waits for the device.

    adapter: the name under which it was loaded. Energies without an equal on the other side may belong to layers that
    were split or joined: then their sums are equal. A change of zeros has no effect and counts as loaded.
    """
    layers = [module for model in models for module in model.modules() if isinstance(module, BaseTunerLayer)]
    changes, parameters = _loaded(layers, adapter)
    dtypes = {parameter.dtype for parameter in parameters}
    tolerance = TOLERANCE if dtypes <= {torch.float32, torch.float64} else ROUGH_TOLERANCE
    wanted, found = _unmatched(_grouped(file.changes), changes, tolerance)
    missing: set[str] = set()
    total = sum(group.energy for group in wanted)
    if not abs(total - sum(found)) <= tolerance * total:
        missing.update(key for group in wanted for key in group.keys)
    missing.update(key for key, weight in file.others.items() if not _is_among(weight, parameters, tolerance))
    return [file.file_keys.get(key, key) for key in file.weights if key in missing]


def _grouped(changes: Sequence[WeightChange]) -> list[Energies]:
    groups: dict[float, list[WeightChange]] = {}
    for change in changes:
        groups.setdefault(change.origin, []).append(change)
    return [
        Energies(sum(c.energy() for c in group), [key for c in group for key in c.keys]) for group in groups.values()
    ]


def _loaded(layers: Sequence[Any], adapter: str) -> tuple[list[float], list[Tensor]]:
    """Energies of the adapter's changes in the model, and all its parameters."""
    low_rank: list[WeightChange] = []
    energies: list[float] = []
    parameters: list[Tensor] = []
    for layer in layers:
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
            down, up = (holder[adapter].get_parameter("weight") for holder in (layer.lora_A, layer.lora_B))
            low_rank.append(LowRank("", ("", ""), (down, up), layer.scaling[adapter]))
        elif any(adapter in getattr(layer, name) for name in layer.adapter_layer_names):
            energies.append(float(layer.get_delta_weight(adapter).double().square().sum()))
        for name in layer.adapter_layer_names:
            if adapter in (holder := getattr(layer, name)):
                held = holder[adapter]
                parameters += held.parameters() if isinstance(held, nn.Module) else [held]
    return energies + [group.energy for group in _grouped(low_rank)], parameters


def _unmatched(
    wanted: Sequence[Energies], found: Sequence[float], tolerance: float
) -> tuple[list[Energies], list[float]]:
    """Energies of each list without an equal in the other list; each energy is matched once."""
    alone: list[Energies] = []
    left, rest = [], deque(sorted(found))
    for group in sorted(wanted, key=lambda group: group.energy):
        while rest and rest[0] < group.energy * (1 - tolerance):
            left.append(rest.popleft())
        if rest and rest[0] <= group.energy * (1 + tolerance):
            rest.popleft()
        elif group.energy > 0:
            alone.append(group)
    return alone, [*left, *rest]


def _is_among(weight: Tensor, parameters: Sequence[Tensor], tolerance: float) -> bool:
    """Whether a parameter holds the values of `weight`, in any shape."""
    values = weight.flatten().double()
    return any(
        torch.allclose(parameter.flatten().double().to(values.device), values, rtol=tolerance, atol=tolerance * 1e-3)
        for parameter in parameters
        if parameter.numel() == values.numel()
    )
