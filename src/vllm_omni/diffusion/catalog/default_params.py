"""Sampling parameters that a model folder sets as its own defaults."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.catalog.folder_files import DEFAULTS_FILE, read_object
from vllm_omni.diffusion.catalog.model_info import SIZES
from vllm_omni.diffusion.data import DEFAULT_PARAMS
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.field_values import shown

MOST_PIXELS_A_SIDE = 2**16


def read_default_sampling_params(path: Path) -> dict[str, Any]:
    """Sampling defaults of the model folder, or {}. Raises ConfigError for what no later limit checks."""
    if not os.path.lexists(path / DEFAULTS_FILE):  # a link to nothing is told
        return {}
    values = read_object(path, DEFAULTS_FILE)
    if unknown := sorted(set(values) - set(accepted := [name for name in DEFAULT_PARAMS if name != "seconds"])):
        raise ConfigError(f"{DEFAULTS_FILE} has unknown keys {unknown}, accepted are {', '.join(accepted)}")
    for key, value in values.items():
        is_side = type(value) is int and 1 <= value <= MOST_PIXELS_A_SIDE
        if value is None or (key in SIZES and not is_side):
            takes = f"pixels, 1 to {MOST_PIXELS_A_SIDE}" if key in SIZES else "a value, or is left out"
            raise ConfigError(f"{DEFAULTS_FILE}: {key} takes {takes}, got {shown(value)}")
    return values
