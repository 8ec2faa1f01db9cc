"""Check of the sizes that are read off the configs of a whole pipeline's models (no torch here)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm_omni.diffusion.folder_files import short
from vllm_omni.errors import ConfigError

NUMBERS = (
    "in_channels",
    "latent_channels",
    "patch_size_t",
    "pos_embed_max_size",
    "scale_factor_spatial",
    "scale_factor_temporal",
    "spatial_compression_ratio",
    "temporal_compression_ratio",
)
LISTS = (
    "block_out_channels",
    "encoder_block_out_channels",
    "spatio_temporal_scaling",
    "temperal_downsample",
    "temporal_expansions",
)
NUMBERS_OR_LISTS = ("patch_size", "sample_size")


def check_sizes(component: str, values: Mapping[str, Any]) -> None:
    """Raise ConfigError, with the key, for a size in the component's config.json that is none; null means no size."""
    kinds: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
        (NUMBERS, _is_size, "a whole number from 1"),
        (LISTS, _is_list, "a list of whole numbers"),
        (NUMBERS_OR_LISTS, lambda value: _is_size(value) or _is_list(value), "a whole number from 1 or a list of them"),
    )
    for keys, is_good, accepted in kinds:
        for key in keys:
            if (value := values.get(key)) is not None and not is_good(value):
                raise ConfigError(f"{component}/config.json: {key} takes {accepted}, got {short(value)}")


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_list(value: Any) -> bool:
    """Whether `value` is a list of numbers and switches."""
    return isinstance(value, list) and bool(value) and all(type(item) in (int, bool) and item >= 0 for item in value)
