"""Errors of single requests, in the form that the engine gets."""

from __future__ import annotations

import traceback

import torch

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.compute.device.failures import is_out_of_memory
from vllm_omni.diffusion.messages.plan import ItemError
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.errors import AdapterChangedError, InvalidRequestError, ModerationBlockedError

LARGEST_USUAL_GUIDANCE = 100.0
"""A larger guidance scale is reported as the cause of values that are not finite. Usual scales are below 30."""
LARGEST_USUAL_LORA_SCALE = 10.0
"""A larger adapter scale is reported as the cause of values that are not finite. Usual scales are below 2."""


def item_error(error: Exception) -> ItemError:
    """The ItemError for an exception that was raised while one request ran; called while it is handled."""
    if is_out_of_memory(error):
        reason = str(error).partition("\n")[0]
        message = f"the device ran out of memory on this request: {reason}"
        return ItemError(message, "out_of_memory", traceback.format_exc())
    if isinstance(error, ModerationBlockedError):
        return ItemError(str(error), "blocked")
    if isinstance(error, InvalidRequestError):
        return ItemError(str(error), "invalid", param=error.param)
    if isinstance(error, AdapterChangedError):
        return ItemError(str(error), "changed", param=error.param)
    return ItemError(str(error) or type(error).__name__, "internal", traceback.format_exc())


def not_finite_error(request: DiffusionRequest, info: ModelInfo, dtype: torch.dtype) -> ItemError:
    """The ItemError for a request whose latents or pixels are NaN or infinite.

    The reported cause is a guess: a parameter far above usual values, else float16, whose largest number is 65504.
    """
    for name, value, largest in _scales(request, info):
        if abs(value) > largest:
            return ItemError(
                f"{name} {value:g} made values that are not numbers (NaN or infinite); up to {largest:g} is usual",
                "invalid",
                param=name,
            )
    if dtype == torch.float16:
        return ItemError("float16 overflowed: use bfloat16 (--dtype bfloat16)", "not_finite")
    return ItemError("the model produced values that are not numbers (NaN or infinite)", "not_finite")


def _scales(request: DiffusionRequest, info: ModelInfo) -> list[tuple[str, float, float]]:
    """Name, value and largest usual value of each scale of the request, as the caller gave it."""
    guidance, scales, is_whole = info.guidance, [], info.served_by == "diffusers"
    if is_whole or request.has_guidance:
        scales.append((guidance.parameter, request.true_cfg_scale - guidance.offset, LARGEST_USUAL_GUIDANCE))
    if is_whole and request.guidance_scale is not None:
        scales.append(("guidance_scale", request.guidance_scale, LARGEST_USUAL_GUIDANCE))
    scales += [("lora_scale", lora.scale, LARGEST_USUAL_LORA_SCALE) for lora in request.loras]
    return scales
