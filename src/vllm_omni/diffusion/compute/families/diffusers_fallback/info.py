"""Facts of a model that a whole pipeline serves, from its configs and the signature of the pipeline's `__call__`.

`describe` imports diffusers, and so torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.catalog.configs import read_config, takes_flow_shift
from vllm_omni.diffusion.catalog.default_params import read_default_sampling_params
from vllm_omni.diffusion.catalog.folder_files import DEFAULTS_FILE, MODEL_INDEX, read_object
from vllm_omni.diffusion.catalog.model_info import Guidance
from vllm_omni.diffusion.catalog.tokenizer_files import read_settings
from vllm_omni.diffusion.catalog.whole_info import WholeModelInfo, WholePipeline
from vllm_omni.diffusion.compute.families.diffusers_fallback.components import component_classes, pipeline_class
from vllm_omni.diffusion.compute.families.diffusers_fallback.config_sizes import (
    OwnSize,
    check_index_sizes,
    check_sizes,
    frame_multiple,
    latent_side,
    longest_side,
    own_size,
    patch_side,
    size_bins,
)
from vllm_omni.diffusion.compute.families.diffusers_fallback.signature import CallSignature
from vllm_omni.diffusion.compute.text.tokenizers import load_tokenizer
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.images import InputImage, ReaderSizes

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


NUM_REFERENCES = {
    "DreamLiteMobilePipeline": (0, 1),
    "DreamLitePipeline": (0, 1),
    "Flux2KleinKVPipeline": (0, 4),
    "Flux2KleinPipeline": (0, 4),
    "Flux2Pipeline": (0, 10),
    "FluxKontextPipeline": (0, 1),
    "GlmImagePipeline": (0, 16),
    "QwenImage21Pipeline": (0, 16),
    "ZImageOmniPipeline": (0, 16),
}
"""Class -> least and most pictures of a request (16: the limit of OpenAI's API, for models without a limit). Listed are
classes that need no picture, or that take a list as the pictures of one request instead of a batch. Signatures do not
tell: `image` is None by default also in calls that fail without it. All other classes take one picture."""
MAX_REFERENCE_PIXELS = 2048 * 2048
"""Most pixels kept of a picture that is a reference and not changed: pipelines resize it to about 1 million."""


@dataclass(frozen=True)
class WholeImageInput:
    """`ImageInput` of a whole pipeline, which gets the pictures as they were sent."""

    min_images: int
    max_images: int
    follows_input: bool
    """See `WholePipeline.follows_input`."""
    size_multiple: int
    area: int
    """Pixels of the model's own size."""

    def sizes(self, width: int, height: int) -> ReaderSizes:
        if not self.follows_input and width * height > MAX_REFERENCE_PIXELS:
            scale = math.sqrt(MAX_REFERENCE_PIXELS / (width * height))
            width, height = max(1, int(width * scale)), max(1, int(height * scale))
        return ReaderSizes((width, height), (width, height))

    def count_prompt_tokens(self, images: Sequence[InputImage]) -> int:
        return 0

    def output_size(self, images: Sequence[InputImage]) -> tuple[int, int]:
        """See `ImageInput.output_size`: the size of a picture that is changed, rounded down as in diffusers; otherwise
        the proportions of the last picture at the model's own area."""
        height, width = images[-1].reference.shape[:2]
        multiple = self.size_multiple
        if self.follows_input:
            return max(multiple, height - height % multiple), max(multiple, width - width % multiple)
        scale = math.sqrt(self.area / (height * width)) / multiple
        return max(1, round(height * scale)) * multiple, max(1, round(width * scale)) * multiple


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


def describe(path: Path) -> WholeModelInfo:
    """Facts of the model in `path`. Raises ConfigError for a pipeline or component that is not served."""
    pipeline = pipeline_class(path)
    signature = CallSignature.of(pipeline)
    components = component_classes(path)
    configs: dict[str, Mapping[str, Any]] = {
        name: read_config(path, name) for name in ("vae", "transformer", "unet") if name in components
    }
    for name, values in configs.items():
        check_sizes(name, values)
    scheduler = components.get("scheduler")
    taken = dict(signature.defaults)
    if scheduler is None or not scheduler.__name__.startswith("FlowMatch"):
        taken.pop("sigmas", None)  # only with flow matching are sigmas in (0, 1]
    has_shift = scheduler is not None and takes_flow_shift(
        scheduler.__name__, read_config(path, "scheduler", "scheduler_config.json")
    )
    longest, count_prompt_tokens = _prompt_reader(pipeline.__name__, path, components)
    vae_scale = latent_side(configs.get("vae", {}))
    index = read_object(path, MODEL_INDEX)
    check_index_sizes(index)
    own = own_size(pipeline.__name__, index, configs, vae_scale)
    folder_defaults = read_default_sampling_params(path)
    call_defaults = _call_defaults(taken, own)
    remarks: list[str] = []
    if (own_length := call_defaults.get("max_sequence_length")) is not None:
        longest = longest or own_length
        call_defaults["max_sequence_length"] = min(longest, own_length)
        if longest < own_length and "max_sequence_length" not in folder_defaults:
            remarks.append(_say_shortened(pipeline.__name__, longest, own_length))
    defaults = call_defaults | folder_defaults
    if "num_frames" in taken and "num_frames" not in defaults:
        raise ConfigError(f"{pipeline.__name__} has no default num_frames: write one to the model's {DEFAULTS_FILE}")
    side = vae_scale * patch_side(configs)
    whole = replace(signature.whole, parameters=tuple(taken), takes_flow_shift=has_shift)
    image_input = _image_input(whole, side, defaults) if signature.takes_image else None
    if image_input is not None and image_input.max_images > 1:
        whole = replace(whole, takes_image_list=True)
    if signature.has_binning:
        bins = size_bins(pipeline, max(own.height, own.width))
        whole = replace(whole, bins=bins, declines_binning=not bins)
    return WholeModelInfo(
        path=path,
        family="diffusers_fallback",
        size_multiple=side,
        pixels_per_token=side,
        max_prompt_tokens=longest or LONGEST_PROMPT,
        count_prompt_tokens=count_prompt_tokens,
        attention_tokens=ATTENTION_TOKENS,
        guidance=_guidance(taken),
        pipeline=whole,
        image_input=image_input,
        frame_multiple=frame_multiple(configs.get("vae", {}), defaults["num_frames"])
        if "num_frames" in taken
        else None,
        default_sampling_params=defaults,
        remarks=tuple(remarks),
        max_side=longest_side(components, configs.get("transformer", {}), side),
    )


def _say_shortened(pipeline: str, longest: int, own_length: int) -> str:
    return (
        f"max_sequence_length is {longest} by default, the most that the model's tokenizers take; by itself "
        f"the {pipeline} has {own_length}"
    )


def _call_defaults(taken: Mapping[str, Any], own: OwnSize) -> dict[str, Any]:
    """Defaults `taken` from the pipeline's call, and the model's own size and frames where the call has none."""
    defaults: dict[str, Any] = {"height": own.height, "width": own.width}
    if "num_frames" in taken and own.num_frames is not None:
        defaults["num_frames"] = own.num_frames
    defaults |= {name: value for name, value in taken.items() if value is not None}
    if "fps" in defaults:
        defaults["fps"] = round(defaults["fps"])  # a float in some signatures
    return defaults


def _image_input(whole: WholePipeline, side: int, defaults: Mapping[str, Any]) -> WholeImageInput:
    least, most = NUM_REFERENCES.get(whole.class_name, (1, 1))
    return WholeImageInput(least, most, whole.follows_input, side, int(defaults["height"]) * int(defaults["width"]))


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
        return None, lambda prompt: len(prompt.split())  # words
    name, most = CLASS_PROMPT_READERS.get(class_name, ("", LONGEST_PROMPT))
    if name not in limits:
        name = max(limits, key=lambda name: limits[name])
    limit = int(min(limits[name], most))
    return limit if limit < LONGEST_PROMPT else None, PromptTokenCounter(path / name, components[name])


def _guidance(taken: Mapping[str, Any]) -> Guidance:
    """Guidance by diffusers' convention.

    In a call with `true_cfg_scale`, `guidance_scale` is an input of the model and no guidance. A missing negative
    prompt means an empty one.
    """
    if "true_cfg_scale" in taken or "negative_prompt" not in taken:
        return Guidance()
    return Guidance("guidance_scale", needs_negative_prompt=False)
