"""Sizes of a whole pipeline: its default size and frames, and the table to which it rounds sizes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_omni.diffusion.catalog.whole_info import SizeBin
from vllm_omni.diffusion.compute.families.diffusers_fallback.config_sizes import longer_side

DEFAULT_SIDE = 1024
CLASS_SIZES = {"MochiPipeline": (480, 848)}
"""Class -> its default (height, width), where only its code has it."""
WIDE_SIZES = {640: (480, 848), 960: (720, 1280)}
"""Target side of a HunyuanVideo 1.5 transformer -> default (height, width) of its pipeline, 16:9."""


class OwnSize(NamedTuple):
    """Default size of a pipeline, in pixels."""

    height: int
    width: int
    num_frames: int | None
    """Default number of frames; None: the configs name no number."""


def own_size(class_name: str, index: Mapping[str, Any], configs: Mapping[str, Any], latent_side: int) -> OwnSize:
    """Size that a pipeline makes for a call without a size.

    index: model_index.json; configs: component -> config; latent_side: side of a latent pixel in pixels.
    """
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
    """Table to which a pipeline with `use_resolution_binning` rounds sizes, for a model of `side` pixels.

    The pipeline makes one of these sizes and resizes the picture to the requested size. Empty: it has no table.
    """
    table: dict[str, list[float]] = getattr(sys.modules[pipeline.__module__], f"ASPECT_RATIO_{side}_BIN", {})
    return tuple(SizeBin(float(ratio), int(height), int(width)) for ratio, (height, width) in table.items())
