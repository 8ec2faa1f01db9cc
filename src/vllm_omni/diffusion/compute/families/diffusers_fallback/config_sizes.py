"""Checks of the sizes in the configs of a whole pipeline's components (no torch here)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm_omni.diffusion.catalog.configs import MAX_SIZE
from vllm_omni.diffusion.catalog.folder_files import MODEL_INDEX
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.field_values import shown

LONGEST_LIST = 16
"""Most items of a list of sizes: each halves the picture, and more would leave nothing of it."""
NUMBERS = (
    "in_channels",
    "latent_channels",
    "patch_size_t",
    "pos_embed_max_size",
    "sample_frames",
    "sample_height",
    "sample_width",
    "scale_factor_spatial",
    "scale_factor_temporal",
    "spatial_compression_ratio",
    "target_size",
    "temporal_compression_ratio",
)
LISTS = ("block_out_channels", "encoder_block_out_channels", "temporal_expansions")
NUMBERS_OR_LISTS = ("patch_size", "sample_size")
SWITCHES = ("spatio_temporal_scaling", "temperal_downsample")
INDEX_NUMBERS = ("default_sample_size",)
"""Sizes in model_index.json."""


def check_sizes(component: str, values: Mapping[str, Any]) -> None:
    """Raise ConfigError, with the key, for an invalid size in the component's config.json; null means no size."""
    number, numbers = (
        f"a whole number from 1 to {MAX_SIZE}",
        f"a list of 1 to {LONGEST_LIST} whole numbers from 1 to {MAX_SIZE}",
    )
    place = f"{component}/config.json"
    _check(place, values, NUMBERS, _is_size, number)
    _check(place, values, LISTS, lambda value: _is_list(value, _is_size), numbers)
    _check(
        place,
        values,
        NUMBERS_OR_LISTS,
        lambda value: _is_size(value) or _is_list(value, _is_size),
        f"{number}, or {numbers}",
    )
    _check(
        place,
        values,
        SWITCHES,
        lambda value: _is_list(value, lambda item: item in (0, 1)),
        f"a list of 1 to {LONGEST_LIST} times true or false",
    )


def check_index_sizes(index: Mapping[str, Any]) -> None:
    """Raise ConfigError, with the key, for an invalid size in model_index.json; null means no size."""
    _check(MODEL_INDEX, index, INDEX_NUMBERS, _is_size, f"a whole number from 1 to {MAX_SIZE}")


def longer_side(size: int | list[int]) -> int:
    """Largest number of a size in a config, which is one number or a list of [height, width]."""
    return size if isinstance(size, int) else max(size)


def _check(
    place: str, values: Mapping[str, Any], keys: tuple[str, ...], is_good: Callable[[Any], bool], accepted: str
) -> None:
    for key in keys:
        if (value := values.get(key)) is not None and not is_good(value):
            raise ConfigError(f"{place}: {key} takes {accepted}, got {shown(value)}")


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_SIZE


def _is_list(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= LONGEST_LIST and all(map(is_item, value))
