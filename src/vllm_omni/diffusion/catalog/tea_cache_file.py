"""Polynomial of TeaCache that a model folder brings, in the format of `vllm-omni calibrate-teacache`."""

from __future__ import annotations

import math
import os
from pathlib import Path

from vllm_omni.diffusion.catalog.folder_files import TEA_CACHE_FILE, read_object
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.field_values import shown


def read_tea_cache_coefficients(path: Path, of_family: tuple[float, ...] | None = None) -> tuple[float, ...] | None:
    """Coefficients of the model folder, highest power first; those of its family if the folder has none.

    Raises ConfigError for a file without at least one finite number.
    """
    if not os.path.lexists(path / TEA_CACHE_FILE):  # a link to nothing is told
        return of_family
    terms = read_object(path, TEA_CACHE_FILE).get("coefficients")
    if not isinstance(terms, list) or not terms or not all(type(x) in (int, float) and math.isfinite(x) for x in terms):
        raise ConfigError(f"{TEA_CACHE_FILE}: coefficients takes a list of finite numbers, got {shown(terms)}")
    return tuple(map(float, terms))
