"""Parameters of a pipeline's `__call__` that we know, and their defaults."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from diffusers.utils import BaseOutput

from vllm_omni.diffusion.catalog.model_info import SIZES
from vllm_omni.diffusion.catalog.whole_info import WholePipeline
from vllm_omni.errors import ConfigError

SAMPLING_PARAMETERS = (
    "height", "width", "num_inference_steps", "negative_prompt", "guidance_scale", "true_cfg_scale", "strength",
    "sigmas", "max_sequence_length", "num_frames", "fps",
)  # fmt: skip
"""Sampling parameters with the same name in a pipeline's call; `fps` has one of `FPS_NAMES` there."""
FPS_NAMES = ("fps", "frame_rate")
REQUIRED = ("prompt", "generator", "num_inference_steps")
STEP_CALLBACKS = ("callback_on_step_end", "callback")
"""Parameters for a step callback; the second is that of older pipelines."""
UNSERVED_INPUTS = (
    "mask", "mask_image", "images", "original_image", "source_embeds", "c2w", "control_image", "control_video",
    "video", "frames", "video_length", "audio", "audio_length_in_s",
)  # fmt: skip
"""Parameters that no route of ours can provide; calls with one of them are not served."""
UNSERVED_COMPONENTS = ("controlnet", "adapter", "audio_vae", "vocoder")
"""Components with which `image` is no picture to edit, or the output is not pictures alone."""
_OWN_CHOICE = "it chooses the size of what it makes by its input, and its call takes none"
UNSERVED_CLASSES = {
    "HunyuanVideo15ImageToVideoPipeline": _OWN_CHOICE,
    "LongCatImageEditPipeline": _OWN_CHOICE,
    "StableDiffusionLatentUpscalePipeline": "its pictures are twice as large as their input",
    "StableDiffusionUpscalePipeline": "its pictures are four times as large as their input",
    "UniDiffuserPipeline": "it describes its input pictures and does not edit them",
    "VersatileDiffusionDualGuidedPipeline": "its prompt is a picture and its image a text",
}
"""Class -> reason why it is not served, although its signature looks like that of others."""
INTERLEAVED = (
    "Flux2KleinPipeline", "FluxKontextPipeline", "FluxPipeline", "StableDiffusion3Img2ImgPipeline",
    "SkyReelsV2Pipeline", "StableDiffusion3Pipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLPipeline",
)  # fmt: skip
"""Pipelines whose models keep nothing from one step to the next (tests show it), so that several requests may be under
way. Requests of other pipelines run in turn: some change the model's attention during a call."""
MAX_INTERLEAVED = 4
"""Most requests under way. Each holds a thread, and its latents and text states on the device."""
PICTURE_FIELDS, VIDEO_FIELDS = ("images", "image"), ("frames",)
"""Fields of a pipeline's output that hold pictures, and those that hold a video."""


@dataclass(frozen=True)
class CallSignature:
    """Facts of a pipeline's `__call__`."""

    defaults: Mapping[str, Any]
    """Parameter of `SAMPLING_PARAMETERS` that the call has -> its default."""
    takes_image: bool
    has_binning: bool
    """Whether it can round sizes to a table of its own."""
    whole: WholePipeline
    """The call, without the facts that depend on a model's configs."""

    @classmethod
    def of(cls, pipeline: type[Any]) -> CallSignature:
        """Facts of the class `pipeline`. Raises ConfigError unless it makes pictures or videos in countable steps."""
        parameters = dict(inspect.signature(pipeline.__call__).parameters)
        parameters.pop("self", None)  # missing in a class without a call of its own
        takes_image, takes_size = "image" in parameters, all(name in parameters for name in SIZES)
        needed = REQUIRED if takes_image else (*REQUIRED, *SIZES)
        missing = [name for name in needed if name not in parameters]
        if missing:
            raise ConfigError(f"{pipeline.__name__} is not available: its call has no {', '.join(missing)}")
        if reason := UNSERVED_CLASSES.get(pipeline.__name__):
            raise ConfigError(f"{pipeline.__name__} is not available yet: {reason}")
        if "layers" in parameters:
            raise ConfigError(f"{pipeline.__name__} is not available yet: it makes several layers a picture")
        if unserved := [name for name, parameter in parameters.items() if _is_unserved(name, parameter)]:
            raise ConfigError(f"{pipeline.__name__} is not available yet: it takes {', '.join(unserved)}")
        if unserved := [name for name in inspect.signature(pipeline).parameters if name in UNSERVED_COMPONENTS]:
            raise ConfigError(f"{pipeline.__name__} is not available yet: it has {', '.join(unserved)}")
        fps_name = next((name for name in FPS_NAMES if name in parameters), "fps")
        names = {name: fps_name if name == "fps" else name for name in SAMPLING_PARAMETERS}
        defaults = {ours: parameters[name].default for ours, name in names.items() if name in parameters}
        whole = WholePipeline(
            class_name=pipeline.__name__,
            parameters=tuple(defaults),
            step_callback=next((name for name in STEP_CALLBACKS if name in parameters), ""),
            max_running=MAX_INTERLEAVED if pipeline.__name__ in INTERLEAVED else 1,
            takes_lora=hasattr(pipeline, "load_lora_weights"),
            follows_input=takes_image and ("strength" in defaults or not takes_size),
            takes_max_area="max_area" in parameters,
            fps_name=fps_name,
            output_name=_output_name(pipeline, "num_frames" in parameters),
        )
        return cls(defaults, takes_image, "use_resolution_binning" in parameters, whole)


def _is_unserved(name: str, parameter: inspect.Parameter) -> bool:
    required = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    return name in UNSERVED_INPUTS or (required and name not in (*REQUIRED, *SAMPLING_PARAMETERS, "image"))


def _output_name(pipeline: type[Any], makes_videos: bool) -> str:
    """Field with the pictures or video, by the output classes that the call's code names. Raises ConfigError."""
    wanted = VIDEO_FIELDS if makes_videos else PICTURE_FIELDS
    made = _output_fields(inspect.unwrap(pipeline.__call__))
    name = next((name for name in wanted if name in made), wanted[0])
    if made and name not in made:
        raise ConfigError(f"{pipeline.__name__} is not available: it makes {', '.join(made)} and no {wanted[0]}")
    return name


def _output_fields(call: Any) -> list[str]:
    named = [call.__globals__.get(name) for name in call.__code__.co_names]
    outputs = [cls for cls in named if inspect.isclass(cls) and issubclass(cls, BaseOutput) and is_dataclass(cls)]
    return [field.name for output in outputs for field in fields(output)]
