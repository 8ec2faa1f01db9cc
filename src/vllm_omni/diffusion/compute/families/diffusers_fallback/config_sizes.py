"""Sizes in the configs of a whole pipeline's components: their checks, and the sizes that follow from them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vllm_omni.diffusion.catalog.configs import MAX_SIZE
from vllm_omni.diffusion.catalog.folder_files import MODEL_INDEX
from vllm_omni.diffusion.catalog.whole_info import SizeBin
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.field_values import shown

LONGEST_LIST = 16
"""Most items of a list of sizes: each halves the picture, and more would leave nothing of it."""
NUMBER = f"a whole number from 1 to {MAX_SIZE}"
NUMBERS = (
    "in_channels", "latent_channels", "patch_size_t", "pos_embed_max_size", "sample_frames", "sample_height",
    "sample_width", "scale_factor_spatial", "scale_factor_temporal", "spatial_compression_ratio", "target_size",
    "temporal_compression_ratio",
)  # fmt: skip
LISTS = ("block_out_channels", "encoder_block_out_channels", "temporal_expansions")
NUMBERS_OR_LISTS = ("patch_size", "sample_size")
SWITCHES = ("spatio_temporal_scaling", "temperal_downsample")
INDEX_NUMBERS = ("default_sample_size",)
"""Sizes in model_index.json."""
DEFAULT_SIDE = 1024
CLASS_SIZES = {"MochiPipeline": (480, 848)}
"""Class -> its default (height, width), where only its code has it."""
WIDE_SIZES = {640: (480, 848), 960: (720, 1280)}
"""Target side of a HunyuanVideo 1.5 transformer -> default (height, width) of its pipeline, 16:9."""
SQUARE_TABLES = ("CogView3PlusTransformer2DModel", "OmniGenTransformer2DModel", "SD3Transformer2DModel")
"""Transformers with a table of positions of `pos_embed_max_size` rows and columns."""
COUNTED_TABLES = ("AuraFlowTransformer2DModel",)
"""Transformers whose `pos_embed_max_size` is the number of all positions of such a table."""


def check_sizes(component: str, values: Mapping[str, Any]) -> None:
    """Raise ConfigError, with the key, for an invalid size in the component's config.json; null means no size."""
    place, numbers = f"{component}/config.json", f"a list of 1 to {LONGEST_LIST} whole numbers from 1 to {MAX_SIZE}"
    _check(place, values, NUMBERS, _is_size, NUMBER)
    _check(place, values, LISTS, _is_list_of_sizes, numbers)
    _check(place, values, NUMBERS_OR_LISTS, lambda x: _is_size(x) or _is_list_of_sizes(x), f"{NUMBER}, or {numbers}")
    _check(place, values, SWITCHES, _is_list_of_switches, f"a list of 1 to {LONGEST_LIST} times true or false")


def check_index_sizes(index: Mapping[str, Any]) -> None:
    """Raise ConfigError, with the key, for an invalid size in model_index.json; null means no size."""
    _check(MODEL_INDEX, index, INDEX_NUMBERS, _is_size, NUMBER)


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


def _is_list_of_sizes(value: Any) -> bool:
    return _is_list(value) and all(map(_is_size, value))


def _is_list_of_switches(value: Any) -> bool:
    return _is_list(value) and all(item in (0, 1) for item in value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= LONGEST_LIST


class OwnSize(NamedTuple):
    """Default size of a pipeline, in pixels."""

    height: int
    width: int
    num_frames: int | None
    """None: the configs name no number."""


def own_size(class_name: str, index: Mapping[str, Any], configs: Mapping[str, Any], latent_side: int) -> OwnSize:
    """Size for a call without a size. index: model_index.json; latent_side: side of a latent pixel in pixels."""
    transformer = configs.get("transformer", {})
    num_frames = transformer.get("sample_frames")
    if num_frames is not None and class_name == "AllegroPipeline":  # counts latent frames there
        num_frames *= configs.get("vae", {}).get("temporal_compression_ratio") or 1
    if (size := CLASS_SIZES.get(class_name)) is not None:
        return OwnSize(*size, num_frames)
    if class_name.startswith("HunyuanVideo15") and (size := WIDE_SIZES.get(transformer.get("target_size", 0))):
        return OwnSize(*size, num_frames)
    if side := index.get("default_sample_size"):
        return OwnSize(side, side, num_frames)
    if (height := transformer.get("sample_height")) and (width := transformer.get("sample_width")):
        return OwnSize(height * latent_side, width * latent_side, num_frames)
    side = _sample_side(configs) * latent_side or DEFAULT_SIDE
    return OwnSize(side, side, num_frames)


def _sample_side(configs: Mapping[str, Any]) -> int:
    """Side in latent pixels of the pictures in training; 0: the configs do not say."""
    sizes = [configs[name].get("sample_size") for name in ("transformer", "unet") if name in configs]
    return longer_side(next((size for size in sizes if size), 0))


def size_bins(pipeline: type[Any], side: int) -> tuple[SizeBin, ...]:
    """Sizes that a pipeline with `use_resolution_binning` makes, for a model of `side` pixels; may be empty."""
    table: dict[str, list[float]] = getattr(sys.modules[pipeline.__module__], f"ASPECT_RATIO_{side}_BIN", {})
    return tuple(SizeBin(float(ratio), int(height), int(width)) for ratio, (height, width) in table.items())


def longest_side(components: Mapping[str, type[Any]], transformer: Mapping[str, Any], side: int) -> int | None:
    """Pixels of the longest side that a transformer's table of positions allows; None: it has no such table."""
    name, size = getattr(components.get("transformer"), "__name__", ""), transformer.get("pos_embed_max_size")
    if size is None or name not in (*SQUARE_TABLES, *COUNTED_TABLES):
        return None
    return side * (math.isqrt(size) if name in COUNTED_TABLES else int(size))


def frame_multiple(vae: Mapping[str, Any], num_frames: int) -> int:
    """`ModelInfo.frame_multiple` of a video model; 1 if the default number of frames is no multiple plus one."""
    multiple = int(vae.get("temporal_compression_ratio") or vae.get("scale_factor_temporal") or 1)
    for key in ("spatio_temporal_scaling", "temperal_downsample"):
        if vae.get(key) and multiple == 1:
            multiple = (vae.get("patch_size_t") or 1) * 2 ** sum(map(bool, vae[key]))
    if multiple == 1:
        multiple = math.prod(vae.get("temporal_expansions") or (1,))
    return multiple if (num_frames - 1) % multiple == 0 else 1


def latent_side(vae: Mapping[str, Any]) -> int:
    """Side of a latent pixel in pixels."""
    if ratio := vae.get("spatial_compression_ratio") or vae.get("scale_factor_spatial"):
        return int(ratio)
    if scaling := vae.get("spatio_temporal_scaling"):
        return longer_side(vae.get("patch_size") or 1) * int(2 ** sum(map(bool, scaling)))
    for key, beyond in (("block_out_channels", 1), ("encoder_block_out_channels", 1), ("temperal_downsample", 0)):
        if vae.get(key):
            return int(2 ** (len(vae[key]) - beyond))
    return 8


def patch_side(configs: Mapping[str, Mapping[str, Any]]) -> int:
    """Side of a transformer's token in latent pixels; 1 for a U-Net."""
    transformer = configs.get("transformer", {})
    patch = longer_side(transformer.get("patch_size") or 1)
    channels = configs.get("vae", {}).get("latent_channels")
    # A token holds 2x2 latent pixels in its channels.
    packed = channels is not None and transformer.get("in_channels") == 4 * channels
    return (2 if packed else 1) * patch
