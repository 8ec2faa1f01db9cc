"""Loading of a transformer from a single file, in place of the files in the model folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vllm_omni.diffusion.catalog.expected_weights import ExpectedWeights
from vllm_omni.diffusion.catalog.transformer_files import TransformerFile, read_transformer_file
from vllm_omni.diffusion.compute.layers.fp8 import has_float8_sizes, in_float8, keep_in_float8
from vllm_omni.diffusion.compute.layers.linear import ColumnLinear, RowLinear
from vllm_omni.diffusion.compute.layers.rounding import FLOAT8, Float8Rows, Rows
from vllm_omni.diffusion.compute.weights.gguf_file import load_gguf, with_dims_of_one
from vllm_omni.diffusion.compute.weights.loading import (
    OnBytes,
    WeightTarget,
    checkpoint_modules,
    set_dtype,
    weight_targets,
)
from vllm_omni.diffusion.compute.weights.stored_parts import FLOAT8_TYPES, StoredPart, find_parts
from vllm_omni.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Float8Choice:
    """Layers of a transformer that are computed in float8."""

    layers: tuple[str, ...]
    """Last names of the layers that can be."""
    rounds_all: bool
    """Whether all of them are (`--quantization fp8`): weights of other types are rounded when they are read."""
    keeps_stored: bool
    """Whether those are that the file stores in float8 (e4m3fn); otherwise they are expanded to the model's dtype."""


@dataclass(frozen=True)
class TransformerSource:
    """A single file with the weights of one transformer, and the weights that this transformer needs."""

    file: TransformerFile
    parts: Mapping[str, StoredPart]
    """Weights of the transformer by their names in the model folder, in the order of the file."""

    @classmethod
    def open(
        cls, path: str, flag: str, component: str, class_name: str, expected: ExpectedWeights
    ) -> TransformerSource:
        """Read the file's header. class_name: see `find_parts`; expected: weights by `component`'s config.json.

        Raises ConfigError, with the first difference, for a file that does not fit the model.
        """
        file = read_transformer_file(path, flag)
        shapes = expected.all_shapes()
        parts = find_parts(file, class_name, shapes)
        taken = {name: part for name, part in parts.items() if name in shapes or not name.endswith(expected.unread)}
        if file.is_gguf:
            taken = {name: with_dims_of_one(part, shapes.get(name, part.shape)) for name, part in taken.items()}
        _check_fit(file, component, taken, shapes)
        return cls(file, taken)


def _check_fit(
    file: TransformerFile, component: str, parts: Mapping[str, StoredPart], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    missing = [name for name in shapes if name not in parts]
    if len(missing) == len(shapes):
        raise ConfigError(
            f"{file.flag} takes the weights of this model's {component}, such as {missing[0]}; {file.path} has none of "
            f"them, but {next(iter(file.weights))}"
        )
    for name, part in parts.items():
        if name in shapes and part.shape != shapes[name]:
            raise ConfigError(
                f"{file.path}: {_called(name, part)} has shape {part.shape}, by {component}/config.json it is "
                f"{shapes[name]}"
            )
    if missing:
        raise ConfigError(
            f"{file.path} lacks {len(missing)} weights of the {component}, among them {', '.join(missing[:3])}"
        )
    if surplus := [_called(name, part) for name, part in parts.items() if name not in shapes]:
        raise ConfigError(
            f"{file.path} has {len(surplus)} weights that the {component} does not take, among them "
            f"{', '.join(surplus[:3])}"
        )


def _called(name: str, part: StoredPart) -> str:
    """Name of a weight, and that in the file where it differs."""
    return name if part.key == name else f"{name} ({part.key} in the file)"


def load_transformer_file(
    module: nn.Module,
    source: TransformerSource,
    names: Mapping[str, tuple[str, ...]],
    device: torch.device,
    dtype: torch.dtype,
    on_bytes: OnBytes,
    float8: Float8Choice,
) -> None:
    """Move `module`, built on the meta device, to `device` and fill it from a single file: see `load_weights`.

    Weights are read one at a time, and by each rank of a tensor group only its shard. Float8 values that stay in float8
    are not rounded again: their scale in the file becomes the scale of their rows.
    A GGUF file's blocks stay as they are, and nothing is in float8.
    Raises ConfigError when `device` does not support float8 layers that `--quantization fp8` asks for.
    """
    if source.file.is_gguf:
        load_gguf(module, source.file.path, source.parts, names, device, dtype, on_bytes)
        return
    set_dtype(module, dtype)
    if float8.rounds_all:
        keep_in_float8(module, float8.layers, device)
    elif float8.keeps_stored:
        _keep_stored_float8(module, source.parts, names, float8.layers, device)
    module.to_empty(device=device)
    targets = weight_targets(module, names)
    assert targets.keys() == source.parts.keys(), "the transformer has other weights than its config says"
    with safe_open(source.file.path, framework="pt", device=str(device)) as weights:
        for name, part in source.parts.items():
            on_bytes(targets[name].fill(_OpenPart(part, weights)))
    module.requires_grad_(False).eval()
    _log_source(source, targets)


def _keep_stored_float8(
    module: nn.Module,
    parts: Mapping[str, StoredPart],
    names: Mapping[str, tuple[str, ...]],
    layers: tuple[str, ...],
    device: torch.device,
) -> None:
    """Replace layers whose weights are all stored in float8 by float8 layers, where their sizes allow it."""
    for path, linear in list(module.named_modules()):
        if path.rpartition(".")[2] not in layers:
            continue
        assert isinstance(linear, (ColumnLinear, RowLinear)), f"{path} is a {type(linear).__name__}"
        stored = [parts[f"{name}.weight"].dtype for name in checkpoint_modules(path, names)]
        if set(stored) == {"F8_E4M3"} and has_float8_sizes(linear, device):
            module.set_submodule(path, in_float8(linear))


def _log_source(source: TransformerSource, targets: Mapping[str, WeightTarget]) -> None:
    """Log the file, and how its float8 weights are kept if it has any."""
    stored = [name for name, part in source.parts.items() if part.dtype in FLOAT8_TYPES]
    kept = sum(targets[name].scale is not None for name in stored)
    float8 = f", {len(stored)} of them in float8: {kept} stay in float8, {len(stored) - kept} are expanded"
    logger.info(
        "read the %d weights of a transformer from %s%s", len(source.parts), source.file.path, float8 if stored else ""
    )


@dataclass(frozen=True)
class _OpenPart:
    """A part in an open file; an index gives that piece of it."""

    part: StoredPart
    weights: Any
    """The open safetensors file."""

    def __getitem__(self, cuts: tuple[slice, ...]) -> Rows:
        """Piece of the part. cuts: a slice for each dim. Float8Rows for a matrix in e4m3fn with a scale."""
        part = self.part
        stored = self.weights.get_slice(part.key)
        if not part.shape:
            return self._whole(part.key)
        first, last, _ = cuts[0].indices(part.shape[0])
        rows = slice(part.first_row + first, part.first_row + last)
        values: Tensor = stored[(rows, *cuts[1:])]
        if part.scale_key is None:
            return values
        scale = self._whole(part.scale_key).float().reshape(-1, 1)
        scale = scale.expand(len(values), 1) if len(scale) == 1 else scale[rows]
        if values.dtype == FLOAT8 and values.dim() == 2:
            return Float8Rows(values, scale, torch.float32)
        return values.float() * scale.reshape(-1, *(1,) * (values.dim() - 1))

    def _whole(self, key: str) -> Tensor:
        tensor: Tensor = self.weights.get_tensor(key)
        return tensor
