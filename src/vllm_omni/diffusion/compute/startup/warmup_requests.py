"""Requests of the warm-up. No torch."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.inputs.images import InputImage

MAX_PICTURE_TOKENS = 256
"""Most image tokens of a warm-up picture."""
COMMON_PROMPT = "a photo of a red apple on a wooden table, in the style of an old master"
"""Prompt of a common length."""


def warmup_request(info: ModelInfo, prompt: str, max_tokens: int | None = MAX_PICTURE_TOKENS) -> DiffusionRequest:
    """Request of two steps for a square picture of at most `max_tokens` image tokens; a video has two latent frames.

    max_tokens None: the model's default size and number of frames. Editing models get a black picture of the same size.
    """
    defaults = info.default_sampling_params
    height, width, num_frames = defaults["height"], defaults["width"], defaults.get("num_frames", 1)
    if max_tokens is not None:
        height = width = min(height, width, math.isqrt(max_tokens) * info.pixels_per_token)
        num_frames = min(num_frames, 1 + (info.frame_multiple or 0))
    black = np.zeros((height, width, 3), np.uint8)
    return DiffusionRequest(
        request_id=f"warm-up: {prompt}",
        prompt=prompt,
        height=height,
        width=width,
        num_inference_steps=2,
        guidance_scale=1.0,
        seed=0,
        max_sequence_length=defaults.get("max_sequence_length", info.max_prompt_tokens),  # some models pad prompts
        images=() if info.image_input is None or not info.image_input.min_images else (InputImage.of(black, black),),
        strength=1.0 if "strength" in info.parameters else None,  # all steps, so that they can be timed
        num_frames=num_frames,
    )


def default_request(info: ModelInfo, max_tokens: int | None) -> DiffusionRequest:
    """`warmup_request` with the model's default guidance and negative prompt, as most requests have."""
    defaults = info.default_sampling_params
    scale, negative = info.guidance.resolved(defaults.get(info.guidance.parameter), defaults.get("negative_prompt"))
    return replace(
        warmup_request(info, COMMON_PROMPT, max_tokens),
        negative_prompt=negative,
        guidance_scale=defaults.get("guidance_scale"),
        true_cfg_scale=scale,
    )
