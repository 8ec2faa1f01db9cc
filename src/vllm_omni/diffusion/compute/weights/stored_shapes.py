"""Comparison of a diffusers or transformers model with its weight files, before memory is allocated for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from vllm_omni.diffusion.catalog.weight_files import StoredWeight
from vllm_omni.errors import ConfigError

MOST_PACKED = 8
"""Most parameters in one stored number: a quantized model packs 8 parameters of 4 bits into an int32."""
MOST_TABLES = 2**28
"""Most numbers in tables that a model computes, such as position tables; files do not hold them. 1 GiB in float32."""


def check_stored_shapes(cls: type[Any], folder: Path, stored: Mapping[str, StoredWeight]) -> None:
    """Raise ConfigError when the weights `stored` do not fit a model of class `cls` with the folder's config.json.

    The model is built without memory; a class that does not allow that is not checked. Missing and renamed weights are
    reported by the loading. A model far larger than its files is refused here, because the libraries would fill it with
    random numbers.
    """
    if (built := _build_without_memory(cls, folder)) is None:
        return
    model, is_quantized = built
    expected = {} if is_quantized else model.state_dict()
    # transformers transposes some weights while it loads them.
    order = sorted if issubclass(cls, transformers.PreTrainedModel) else list
    for name, tensor in expected.items():
        shape = tuple(tensor.shape)
        if name in stored and order(stored[name].shape) != order(shape):
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

    None: it cannot be built there, because its class reads tensor values or because config.json has wrong values, which
    the loading reports better. Raises ConfigError for a weight that is larger than any memory.
    """
    try:
        if issubclass(cls, transformers.PreTrainedModel):
            config = cls.config_class.from_pretrained(folder, local_files_only=True)
            with torch.device("meta"):
                return cls(config), hasattr(config, "quantization_config")
        values = cls.load_config(folder, local_files_only=True)
        with torch.device("meta"):
            return cls.from_config(values), "quantization_config" in values
    except Exception as error:  # the libraries do not check their configs and may raise anything
        if "overflow" in str(error):  # torch counts a tensor's bytes in 64 bits
            raise ConfigError(f"{folder.name}/config.json: no memory could hold the {cls.__name__}: {error}") from error
        return None
