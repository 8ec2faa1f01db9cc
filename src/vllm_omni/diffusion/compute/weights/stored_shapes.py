"""Comparison of a library's model with its weight files before memory is spent on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from vllm_omni.diffusion.catalog.weight_headers import StoredWeight
from vllm_omni.errors import ConfigError

MOST_PACKED = 8
"""Numbers of a model that one stored number may hold: a quantized model keeps 8 of 4 bits in an int32."""
MOST_TABLES = 2**28
"""Numbers in tables that a model computes and no file holds, such as those of positions: 1 GiB in float32."""


def check_stored_shapes(cls: type[Any], folder: Path, stored: Mapping[str, StoredWeight]) -> None:
    """Raise ConfigError where the weights `stored` do not fit a model of the class `cls` with the folder's config.json.

    The model is built without memory, where its class allows that. Weights that are missing or have another name are
    left to the loading, but a model that is far larger than its files is refused: the libraries would fill it with
    random numbers.
    """
    built = _build_without_memory(cls, folder)
    if built is None:
        return
    model, is_quantized = built
    expected = {} if is_quantized else model.state_dict()
    for name, tensor in expected.items():
        shape = tuple(tensor.shape)
        if name in stored and not _fits(cls, stored[name].shape, shape):
            raise ConfigError(
                f"{stored[name].file}: {name} has shape {stored[name].shape}, by config.json it is {shape}"
            )
    needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    held = sum(math.prod(weight.shape) for weight in stored.values())
    if needed > MOST_PACKED * held + MOST_TABLES:
        raise ConfigError(
            f"{folder.name}/config.json: the {cls.__name__} would have {needed} numbers, the weight files hold {held}"
        )


def _build_without_memory(cls: type[Any], folder: Path) -> tuple[nn.Module, bool] | None:
    """The model on the meta device, and whether its weights are stored quantized.

    None: it cannot be built so. Some classes look at values of their tensors; of a config of wrong values the loading
    says more. Raises ConfigError for a weight that is larger than any memory.
    """
    try:
        if issubclass(cls, transformers.PreTrainedModel):
            config = cls.config_class.from_pretrained(folder, local_files_only=True)
            with torch.device("meta"):
                return cls(config), hasattr(config, "quantization_config")
        values = cls.load_config(folder, local_files_only=True)
        with torch.device("meta"):
            return cls.from_config(values), "quantization_config" in values
    except Exception as error:  # of any class, as the libraries do not check their configs
        if "overflow" in str(error):  # torch counts a tensor's bytes in 64 bits
            raise ConfigError(f"{folder.name}/config.json: no memory could hold the {cls.__name__}: {error}") from error
        return None


def _fits(cls: type[Any], stored: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a weight can be loaded: transformers transposes some of them on the way."""
    if issubclass(cls, transformers.PreTrainedModel):
        return sorted(stored) == sorted(expected)
    return stored == expected
