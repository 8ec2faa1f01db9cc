"""Search for the model's layers by the names in adapter files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

PREFIXES = {
    "lora_unet_": ("unet_", "transformer_"),
    "lora_transformer_": ("transformer_",),
    "lora_te_": ("text_encoder_",),
    "lora_te1_": ("text_encoder_",),
    "lora_te2_": ("text_encoder_2_",),
    "lora_te3_": ("text_encoder_3_",),
    "base_model_model_": ("unet_", "transformer_"),
}
"""Prefix of Kohya, OneTrainer or peft -> components that it may stand for; a model has one of them."""
OPTIONAL_PARTS = ("text_model_", "processor_")
"""Parts of names that only some versions of the libraries have."""


def layers_by_flat_name(models: Mapping[str, nn.Module]) -> dict[str, str]:
    """Flat name of a layer that adapters can change -> `component.layer`; ambiguous names are left out.

    models: components by their names. A flat name has an underscore for each dot and no `OPTIONAL_PARTS`.
    """
    paths = [f"{component}.{layer}" for component, model in models.items() for layer in _layers(model, "")]
    counts = Counter(map(_flat, paths))
    return {flat: path for path in paths if counts[flat := _flat(path)] == 1}


def find_layer(name: str, layers: Mapping[str, str]) -> str | None:
    """The `component.layer` for a layer's `name` in a file; None: the model has no such layer."""
    flat = _flat(name)
    candidates = [flat]
    for prefix, components in PREFIXES.items():
        if flat.startswith(prefix):
            candidates += [component + flat.removeprefix(prefix) for component in components]
    return next((layers[candidate] for candidate in candidates if candidate in layers), None)


def _layers(module: nn.Module, path: str) -> Iterator[str]:
    """Paths of the modules with a weight; a module with adapters counts as one layer."""
    if isinstance(module, BaseTunerLayer) or isinstance(getattr(module, "weight", None), nn.Parameter):
        yield path
        return
    for name, child in module.named_children():
        yield from _layers(child, f"{path}.{name}" if path else name)


def _flat(name: str) -> str:
    flat = name.replace(".", "_")
    for part in OPTIONAL_PARTS:
        flat = flat.replace(part, "")
    return flat
