"""Which of our parameters a pipeline's `__call__` has, and its defaults for them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.diffusion.registry import SIZES
from vllm_omni.errors import ConfigError

SAMPLING_PARAMETERS = (
    "height",
    "width",
    "num_inference_steps",
    "negative_prompt",
    "guidance_scale",
    "true_cfg_scale",
    "strength",
    "sigmas",
    "max_sequence_length",
    "num_frames",
    "fps",
)
"""The names are the same on both sides, but for `FPS_NAMES`."""
FPS_NAMES = ("fps", "frame_rate")
REQUIRED = ("prompt", "generator", "num_inference_steps")
STEP_CALLBACKS = ("callback_on_step_end", "callback")
"""By either of them a pipeline tells its steps; the second is that of older ones."""
UNSERVED_INPUTS = (
    "mask",
    "mask_image",
    "control_image",
    "control_video",
    "video",
    "frames",
    "video_length",
    "audio",
    "audio_length_in_s",
)
"""What no route of ours brings, or takes back; nor what is required beyond `REQUIRED`."""


@dataclass(frozen=True)
class CallSignature:
    """What of a pipeline's `__call__` concerns us."""

    defaults: Mapping[str, Any]
    """Of those `SAMPLING_PARAMETERS` that it has."""
    step_callback: str
    """One of `STEP_CALLBACKS`; empty: it has none, and its progress bar tells its steps."""
    takes_image: bool
    takes_size: bool
    """False: what it makes is as large as its `image`."""
    takes_max_area: bool
    """Bounds what it makes by a number of pixels of its own, whatever the size that is asked for."""
    fps_name: str
    """What it calls `fps`, if it takes one: of `FPS_NAMES`."""

    @classmethod
    def of(cls, pipeline: type[Any]) -> CallSignature:
        """Raises ConfigError for a pipeline that does not make pictures or videos in steps that can be seen."""
        parameters = dict(inspect.signature(pipeline.__call__).parameters)
        parameters.pop("self", None)  # a class without a call of its own has none
        takes_image, takes_size = "image" in parameters, all(name in parameters for name in SIZES)
        needed = REQUIRED if takes_image else (*REQUIRED, *SIZES)
        missing = [name for name in needed if name not in parameters]
        step_callback = next((name for name in STEP_CALLBACKS if name in parameters), "")
        if missing:
            raise ConfigError(f"{pipeline.__name__} is not available: it has no {', '.join(missing)}")
        if "layers" in parameters:
            raise ConfigError(f"{pipeline.__name__} is not available yet: it makes several layers a picture")
        if unserved := [name for name, parameter in parameters.items() if _is_unserved(name, parameter)]:
            raise ConfigError(f"{pipeline.__name__} is not available yet: it takes {', '.join(unserved)}")
        fps_name = next((name for name in FPS_NAMES if name in parameters), "fps")
        names = {name: fps_name if name == "fps" else name for name in SAMPLING_PARAMETERS}
        return cls(
            defaults={ours: parameters[name].default for ours, name in names.items() if name in parameters},
            step_callback=step_callback,
            takes_image=takes_image,
            takes_size=takes_size,
            takes_max_area="max_area" in parameters,
            fps_name=fps_name,
        )


def _is_unserved(name: str, parameter: inspect.Parameter) -> bool:
    required = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    return name in UNSERVED_INPUTS or (required and name not in (*REQUIRED, *SAMPLING_PARAMETERS, "image"))
