"""Weights of a single file by the names of diffusers, before any is read: renamed, and cut out of fused weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_omni.diffusion.catalog.transformer_files import TransformerFile
from vllm_omni.diffusion.catalog.weight_files import StoredWeight
from vllm_omni.diffusion.compute.weights.float8_scales import SCALE_ENDS, WEIGHT
from vllm_omni.errors import ConfigError, error_line

UNUSED_ENDS = (".scale_input", ".input_scale", ".comfy_quant")
"""Ends of the names of tensors beside float8 weights that nobody reads: a scale of the inputs, which are rounded with
scales of their own here, and a description of the weight."""
FLOAT8_TYPES = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class StoredPart:
    """Rows of a weight in a file, all or some.

    diffusers' conversions of checkpoints take it for a tensor: they rename it, and cut it with `torch.chunk`.
    """

    key: str
    """Name in the file."""
    dtype: str
    """Name of the type in the file's format, such as F32."""
    shape: tuple[int, ...]
    first_row: int = 0
    """Row of the stored weight with which this part begins."""
    scale_key: str | None = None
    """Name of the scale in the file: one number, or one for each row of the stored weight; None: there is none."""

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> tuple[StoredPart, ...]:
        if function is not torch.chunk:
            raise TypeError(f"weights are renamed and cut into rows before they are read, got {function.__name__}")
        return _chunk(*args, **(kwargs or {}))


def _chunk(part: StoredPart, chunks: int, dim: int = 0) -> tuple[StoredPart, ...]:
    """Parts of equal numbers of rows, as `torch.chunk` cuts them."""
    if dim != 0:
        raise TypeError(f"weights are cut into rows, which are dim 0, got {dim}")
    num_rows, *rest = part.shape
    size = max(1, -(-num_rows // chunks))
    return tuple(
        replace(part, shape=(min(size, num_rows - start), *rest), first_row=part.first_row + start)
        for start in range(0, num_rows, size)
    )


def find_parts(file: TransformerFile, class_name: str, expected: Collection[str]) -> dict[str, StoredPart]:
    """Parts of the file by the names of diffusers.

    class_name: class of diffusers whose conversion knows the model's own names; empty: there is none. expected: names
    of the model's weights in diffusers. Raises ConfigError for names that cannot be converted, and for wrong scales.
    """
    parts = _with_scales(file)
    if not class_name or parts.keys() >= set(expected):
        return parts
    converted = _converted(file, parts, class_name)
    # A file with diffusers' names that lacks a weight: the conversion takes some of them for other names.
    return max((parts, converted), key=lambda named: len(named.keys() & set(expected)))


def _with_scales(file: TransformerFile) -> dict[str, StoredPart]:
    """Parts by the names in the file, each with the name of its scale."""
    plain = {name: each for name, each in file.weights.items() if not name.endswith((*SCALE_ENDS, *UNUSED_ENDS))}
    parts = {name: StoredPart(file.prefix + name, each.dtype, each.shape) for name, each in plain.items()}
    for name, scale in file.weights.items():
        if not name.endswith(SCALE_ENDS):
            continue
        weight = next(name.removesuffix(end) for end in SCALE_ENDS if name.endswith(end)) + WEIGHT
        _check_scale(file, name, scale, plain.get(weight))
        if parts[weight].scale_key is not None:
            raise ConfigError(f"{file.path} has two scales of {weight}: {parts[weight].scale_key} and {name}")
        parts[weight] = replace(parts[weight], scale_key=file.prefix + name)
    return parts


def _check_scale(file: TransformerFile, name: str, scale: StoredWeight, weight: StoredWeight | None) -> None:
    if weight is None or weight.dtype not in FLOAT8_TYPES or not weight.shape:
        raise ConfigError(f"{file.path}: {name} is the scale of a float8 weight, which the file does not hold")
    num_rows = weight.shape[0]
    if scale.shape not in ((), (1,), (1, 1), (num_rows,), (num_rows, 1)) or scale.dtype not in ("F32", "F16", "BF16"):
        raise ConfigError(
            f"{file.path}: {name} takes one floating-point number, or one for each of the {num_rows} rows of its "
            f"weight, got {scale.dtype} of shape {scale.shape}"
        )


def _converted(file: TransformerFile, parts: Mapping[str, StoredPart], class_name: str) -> dict[str, StoredPart]:
    """Parts renamed by diffusers from the model's own names."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    convert: Any = SINGLE_FILE_LOADABLE_CLASSES[class_name]["checkpoint_mapping_fn"]
    try:
        return dict(convert(checkpoint=dict(parts), config={}))
    except Exception as error:  # the names may be of any model, and a conversion may raise anything
        raise ConfigError(f"{file.path}: diffusers cannot convert its names: {error_line(error)}") from error
