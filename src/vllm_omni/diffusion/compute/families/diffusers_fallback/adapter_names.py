"""The layers that the keys of an adapter mean, found by the names of the model's own layers."""

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
"""How Kohya, OneTrainer and peft call the components of a pipeline, of which a model has one of several."""
OPTIONAL_PARTS = ("text_model_", "processor_")
"""Parts of names that only some versions of the libraries have."""


def layers_by_flat_name(models: Mapping[str, nn.Module]) -> dict[str, str]:
    """From the flat names of the layers that adapters can change to `component.layer`; ambiguous ones are left out.

    models: components by their names. A flat name has an underscore for each dot and no `OPTIONAL_PARTS`.
    """
    paths = [f"{component}.{layer}" for component, model in models.items() for layer in _layers(model, "")]
    counts = Counter(map(_flat, paths))
    return {flat: path for path in paths if counts[flat := _flat(path)] == 1}


def find_layer(name: str, layers: Mapping[str, str]) -> str | None:
    """The `component.layer` that a file calls `name`; None where the model has none of that name."""
    flat = _flat(name)
    candidates = [flat]
    for prefix, components in PREFIXES.items():
        if flat.startswith(prefix):
            candidates += [component + flat.removeprefix(prefix) for component in components]
    return next((layers[candidate] for candidate in candidates if candidate in layers), None)


def _layers(module: nn.Module, path: str) -> Iterator[str]:
    """Paths of the modules with a weight; one that carries adapters counts as one layer."""
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
