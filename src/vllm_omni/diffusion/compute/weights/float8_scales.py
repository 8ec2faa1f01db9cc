"""Float8 weights that are stored with a scale: a value is the stored number times the scale."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

MARKER = "scaled_fp8"
"""Key by which ComfyUI marks a file whose float8 weights have scales; its tensor says nothing more."""
WEIGHT = ".weight"
SCALE_ENDS = (".scale_weight", ".weight_scale")
"""Ends of the keys of scales, in place of `.weight`: those of ComfyUI, and of compressed-tensors."""


def without_scales(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by key, with those that have a scale multiplied out in float32.

    A scale is one number, or one for each row. Raises ValueError for a scale without a float8 weight, and for one of
    another shape.
    """
    plain = {key: weight for key, weight in weights.items() if not key.endswith(SCALE_ENDS) and key != MARKER}
    for key in weights.keys() - plain.keys() - {MARKER}:
        end = next(end for end in SCALE_ENDS if key.endswith(end))
        name, scale = key.removesuffix(end) + WEIGHT, weights[key]
        weight = weights.get(name)
        if weight is None or not (weight.is_floating_point() and weight.element_size() == 1):
            raise ValueError(f"{key} is the scale of a float8 weight {name}, which the file does not hold")
        if scale.numel() != 1 and scale.shape not in ((len(weight),), (len(weight), 1)):
            raise ValueError(
                f"{key} takes one number, or one for each of the {len(weight)} rows of {name}, got the shape "
                f"{list(scale.shape)}"
            )
        by_row = scale.float().reshape(-1, *(1,) * (weight.dim() - 1))
        plain[name] = weight.float() * by_row
    return plain
