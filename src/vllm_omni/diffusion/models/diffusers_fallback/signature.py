"""Which of our parameters a pipeline's `__call__` has, and its defaults for them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
)
"""The names are the same on both sides."""
REQUIRED = ("prompt", "generator", "num_inference_steps", "height", "width")
STEP_CALLBACKS = ("callback_on_step_end", "callback")
"""By either of them a pipeline tells its steps; the second is that of older ones."""
UNSERVED_INPUTS = (
    "image",
    "mask",
    "mask_image",
    "control_image",
    "video",
    "num_frames",
    "audio_length_in_s",
    "image_embeds",
)
"""What no route of ours brings, or takes back."""


@dataclass(frozen=True)
class CallSignature:
    """What of a pipeline's `__call__` concerns us."""

    defaults: Mapping[str, Any]
    """Of those `SAMPLING_PARAMETERS` that it has."""
    step_callback: str
    """One of `STEP_CALLBACKS`."""

    @classmethod
    def of(cls, pipeline: type[Any]) -> CallSignature:
        """Raises ConfigError for a pipeline that does not make pictures from text in steps that can be seen."""
        parameters = inspect.signature(pipeline.__call__).parameters
        missing = [name for name in REQUIRED if name not in parameters]
        step_callback = next((name for name in STEP_CALLBACKS if name in parameters), None)
        if missing or step_callback is None:
            lacking = ", ".join(missing) or f"{' or '.join(STEP_CALLBACKS)}, by which it could be stopped"
            raise ConfigError(f"{pipeline.__name__} is not available: it has no {lacking}")
        if unserved := [name for name in UNSERVED_INPUTS if name in parameters]:
            raise ConfigError(f"{pipeline.__name__} is not available yet: it takes {', '.join(unserved)}")
        defaults = {name: parameters[name].default for name in SAMPLING_PARAMETERS if name in parameters}
        return cls(defaults, step_callback)
