"""Sampling parameters that a model folder sets as its own defaults."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.catalog.folder_files import DEFAULTS_FILE, read_object, short
from vllm_omni.diffusion.catalog.model_info import SIZES
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

MOST_PIXELS_A_SIDE = 2**16


def read_default_sampling_params(path: Path) -> dict[str, Any]:
    """Sampling defaults of the model folder, {} where it has none.

    Raises ConfigError for unknown keys, for null, and for impossible sides; the rest is checked with the limits.
    """
    if not os.path.lexists(path / DEFAULTS_FILE):  # a link to nothing is told
        return {}
    values = read_object(path, DEFAULTS_FILE)
    accepted = {f.name for f in fields(OmniDiffusionSamplingParams) if f.default is None} | {"negative_prompt"}
    accepted -= {"seconds"}  # a model's own length is its num_frames
    if unknown := sorted(set(values) - accepted):
        raise ConfigError(f"{DEFAULTS_FILE} has unknown keys {unknown}, accepted are {', '.join(sorted(accepted))}")
    for key, value in values.items():
        is_side = type(value) is int and 1 <= value <= MOST_PIXELS_A_SIDE
        if value is None or (key in SIZES and not is_side):
            takes = f"pixels, 1 to {MOST_PIXELS_A_SIDE}" if key in SIZES else "a value, or is left out"
            raise ConfigError(f"{DEFAULTS_FILE}: {key} takes {takes}, got {short(value)}")
    return values
