"""Facts of a model that a whole pipeline serves, from its configs and the signature of the pipeline's `__call__`.

`describe` imports diffusers, and so torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.catalog.configs import read_config
from vllm_omni.diffusion.catalog.default_params import read_default_sampling_params
from vllm_omni.diffusion.catalog.folder_files import DEFAULTS_FILE, MODEL_INDEX, read_object
from vllm_omni.diffusion.catalog.model_info import Guidance
from vllm_omni.diffusion.catalog.tokenizer_files import read_settings
from vllm_omni.diffusion.catalog.whole_info import WholeModelInfo, WholePipeline
from vllm_omni.diffusion.compute.families.diffusers_fallback.components import component_classes, pipeline_class
from vllm_omni.diffusion.compute.families.diffusers_fallback.config_sizes import (
    check_index_sizes,
    check_sizes,
    longer_side,
)
from vllm_omni.diffusion.compute.families.diffusers_fallback.own_sizes import OwnSize, own_size, size_bins
from vllm_omni.diffusion.compute.families.diffusers_fallback.pictures import NUM_REFERENCES, WholeImageInput
from vllm_omni.diffusion.compute.families.diffusers_fallback.signature import CallSignature
from vllm_omni.diffusion.compute.text.tokenizers import load_tokenizer
from vllm_omni.errors import ConfigError

INTERLEAVED = (
    "Flux2KleinPipeline",
    "FluxKontextPipeline",
    "FluxPipeline",
    "StableDiffusion3Img2ImgPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLPipeline",
    "WanPipeline",
)
"""Pipelines whose models keep nothing from one step to the next (tests show it), so that several requests may be under
way. Requests of other pipelines run in turn: some change the model's attention during a call."""
MAX_INTERLEAVED = 4
"""Most requests under way. Each holds a thread, and its latents and text states on the device."""
SQUARE_TABLES = ("CogView3PlusTransformer2DModel", "OmniGenTransformer2DModel", "SD3Transformer2DModel")
"""Transformers with a table of positions of `pos_embed_max_size` rows and columns."""
COUNTED_TABLES = ("AuraFlowTransformer2DModel",)
"""Transformers whose `pos_embed_max_size` is the number of all positions of such a table."""
ATTENTION_TOKENS = 2.0**14
"""`ModelInfo.attention_tokens` of a transformer of common width; the scheduler corrects estimates as it measures."""
LONGEST_PROMPT = 32_000
"""Most tokens of a prompt without another limit: the most characters of any prompt."""

CLASS_PROMPT_READERS = {
    "HunyuanDiTPAGPipeline": ("tokenizer_2", 256),
    "HunyuanDiTPipeline": ("tokenizer_2", 256),
    "HunyuanVideo15Pipeline": ("tokenizer", 1000),
}
"""Class -> the tokenizer that reads most of a prompt, and the tokens to which the class cuts the prompt."""


@dataclass(frozen=True)
class PromptTokenCounter:
    """Counts tokens by the tokenizer that reads most of a prompt; others read only the beginning of a long prompt."""

    folder: Path
    tokenizer_class: type[Any]

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.folder, self.tokenizer_class)

    def __call__(self, prompt: str) -> int:
        """Number of tokens, with those that the tokenizer adds around the prompt."""
        return len(self._tokenizer(prompt, verbose=False).input_ids)


def count_words(prompt: str) -> int:
    """Count words instead of tokens, for pipelines without a separate tokenizer."""
    return len(prompt.split())


def describe(path: Path) -> WholeModelInfo:
    """Facts of the model in `path`.

    Raises ConfigError for a pipeline that cannot be served and for components that are not loaded.
    """
    pipeline = pipeline_class(path)
    signature = CallSignature.of(pipeline)
    components = component_classes(path)
    configs: dict[str, Mapping[str, Any]] = {
        name: read_config(path, name) for name in ("vae", "transformer", "unet") if name in components
    }
    for name, values in configs.items():
        check_sizes(name, values)
    scheduler = components.get("scheduler")
    takes = set(signature.defaults)
    if scheduler is None or not scheduler.__name__.startswith("FlowMatch"):
        takes.discard("sigmas")  # only with flow matching are sigmas in (0, 1]
    longest, count_prompt_tokens = _prompt_reader(pipeline.__name__, path, components)
    vae_scale = latent_side(configs.get("vae", {}))
    index = read_object(path, MODEL_INDEX)
    check_index_sizes(index)
    own = own_size(pipeline.__name__, index, configs, vae_scale)
    folder_defaults = read_default_sampling_params(path)
    call_defaults = _call_defaults(signature, takes, own)
    remarks: list[str] = []
    if (own_length := call_defaults.get("max_sequence_length")) is not None:
        longest = longest or own_length
        call_defaults["max_sequence_length"] = min(longest, own_length)
        if longest < own_length and "max_sequence_length" not in folder_defaults:
            remarks.append(
                f"max_sequence_length is {longest} by default, the most that the model's tokenizers take; by itself "
                f"the {pipeline.__name__} has {own_length}"
            )
    defaults = call_defaults | folder_defaults
    if "num_frames" in takes and "num_frames" not in defaults:
        raise ConfigError(f"{pipeline.__name__} has no default num_frames: write one to the model's {DEFAULTS_FILE}")
    side = vae_scale * _patch_side(configs)
    image_input = _image_input(pipeline.__name__, signature, side, defaults) if signature.takes_image else None
    return WholeModelInfo(
        path=path,
        family="diffusers_fallback",
        size_multiple=side,
        pixels_per_token=side,
        max_prompt_tokens=longest or LONGEST_PROMPT,
        count_prompt_tokens=count_prompt_tokens,
        attention_tokens=ATTENTION_TOKENS,
        guidance=_guidance(takes),
        pipeline=_whole(pipeline, signature, takes, own, image_input, tuple(remarks)),
        image_input=image_input,
        frame_multiple=frame_multiple(configs.get("vae", {}), defaults["num_frames"])
        if "num_frames" in takes
        else None,
        default_sampling_params=defaults,
        max_side=longest_side(components, configs.get("transformer", {}), side),
    )


def _call_defaults(signature: CallSignature, takes: set[str], own: OwnSize) -> dict[str, Any]:
    """Defaults of the pipeline's call, and the model's own size and frames where the call has none."""
    defaults: dict[str, Any] = {"height": own.height, "width": own.width}
    if "num_frames" in takes and own.num_frames is not None:
        defaults["num_frames"] = own.num_frames
    defaults |= {name: value for name, value in signature.defaults.items() if name in takes and value is not None}
    if "fps" in defaults:
        defaults["fps"] = round(defaults["fps"])  # a float in some signatures
    return defaults


def _whole(
    pipeline: type[Any],
    signature: CallSignature,
    takes: set[str],
    own: OwnSize,
    image_input: WholeImageInput | None,
    remarks: tuple[str, ...],
) -> WholePipeline:
    bins = size_bins(pipeline, max(own.height, own.width)) if signature.has_binning else ()
    return WholePipeline(
        class_name=pipeline.__name__,
        parameters=tuple(name for name in signature.defaults if name in takes),
        step_callback=signature.step_callback,
        max_running=MAX_INTERLEAVED if pipeline.__name__ in INTERLEAVED else 1,
        takes_lora=hasattr(pipeline, "load_lora_weights"),
        follows_input=signature.follows_input,
        takes_image_list=image_input is not None and image_input.max_images > 1,
        takes_max_area=signature.takes_max_area,
        fps_name=signature.fps_name,
        output_name=signature.output_name,
        bins=bins,
        declines_binning=signature.has_binning and not bins,
        remarks=remarks,
    )


def longest_side(components: Mapping[str, type[Any]], transformer: Mapping[str, Any], side: int) -> int | None:
    """Pixels of the longest side for which a transformer's table of positions has entries, each `side` pixels long.

    None: the transformer has no table.
    """
    name, size = getattr(components.get("transformer"), "__name__", ""), transformer.get("pos_embed_max_size")
    if size is None or name not in (*SQUARE_TABLES, *COUNTED_TABLES):
        return None
    return side * (math.isqrt(size) if name in COUNTED_TABLES else int(size))


def _image_input(class_name: str, signature: CallSignature, side: int, defaults: Mapping[str, Any]) -> WholeImageInput:
    least, most = NUM_REFERENCES.get(class_name, (1, 1))
    return WholeImageInput(least, most, signature.follows_input, side, int(defaults["height"]) * int(defaults["width"]))


def frame_multiple(vae: Mapping[str, Any], num_frames: int) -> int:
    """`ModelInfo.frame_multiple` of a video model; 1 if the default number of frames is no multiple plus one."""
    multiple = int(vae.get("temporal_compression_ratio") or vae.get("scale_factor_temporal") or 1)
    for key in ("spatio_temporal_scaling", "temperal_downsample"):
        if vae.get(key) and multiple == 1:
            multiple = (vae.get("patch_size_t") or 1) * 2 ** sum(map(bool, vae[key]))
    if multiple == 1:
        multiple = math.prod(vae.get("temporal_expansions") or (1,))
    return multiple if (num_frames - 1) % multiple == 0 else 1


def _prompt_reader(
    class_name: str, path: Path, components: Mapping[str, type[Any]]
) -> tuple[int | None, Callable[[str], int]]:
    """Limit (None: no limit) and token counter of the tokenizer that takes the longest prompts."""
    limits = {
        name: read_settings(path, name).get("model_max_length") or LONGEST_PROMPT
        for name in components
        if name.startswith("tokenizer")
    }
    if not limits:
        return None, count_words
    name, most = CLASS_PROMPT_READERS.get(class_name, ("", LONGEST_PROMPT))
    if name not in limits:
        name = max(limits, key=lambda name: limits[name])
    limit = int(min(limits[name], most))
    return limit if limit < LONGEST_PROMPT else None, PromptTokenCounter(path / name, components[name])


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


def _patch_side(configs: Mapping[str, Mapping[str, Any]]) -> int:
    """Side of a transformer's token in latent pixels; 1 for a U-Net."""
    transformer = configs.get("transformer", {})
    patch = longer_side(transformer.get("patch_size") or 1)
    channels = configs.get("vae", {}).get("latent_channels")
    # A token holds 2x2 latent pixels in its channels.
    packed = channels is not None and transformer.get("in_channels") == 4 * channels
    return (2 if packed else 1) * patch


def _guidance(takes: set[str]) -> Guidance:
    """Guidance by diffusers' convention.

    In a call with `true_cfg_scale`, `guidance_scale` is an input of the model and no guidance. A missing negative
    prompt means an empty one.
    """
    if "true_cfg_scale" in takes or "negative_prompt" not in takes:
        return Guidance()
    return Guidance("guidance_scale", needs_negative_prompt=False)
