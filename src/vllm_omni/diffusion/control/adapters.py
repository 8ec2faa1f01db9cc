"""Adapter that a request asks for."""

from __future__ import annotations

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import LoRA
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.adapter_files import adapter_file
from vllm_omni.inputs.data import LoRARequest, OmniDiffusionSamplingParams
from vllm_omni.inputs.field_values import WrongValueError

MAX_SCALE = 100.0
_MAX_ECHO = 64


def resolve_lora(params: OmniDiffusionSamplingParams, config: OmniDiffusionConfig, info: ModelInfo) -> LoRA | None:
    """Find the adapter's file and its scale: `lora_scale`, or else its own. None: the request asks for no adapter.

    Raises InvalidRequestError for an adapter that is neither served nor has a path, and when the model takes none.
    """
    asked, scale = params.lora_request, params.lora_scale
    if asked is None:
        if scale is not None:
            raise InvalidRequestError(f"lora_scale {scale!r} needs a lora_request", param="lora_scale")
        return None
    if info.why_no_adapters:
        raise InvalidRequestError(info.why_no_adapters, param="lora_request")
    scale = asked.scale if scale is None else scale
    if not -MAX_SCALE <= scale <= MAX_SCALE:
        raise InvalidRequestError(
            f"the scale of a LoRA adapter takes a number from -{MAX_SCALE:g} to {MAX_SCALE:g}, got {scale!r}",
            param="lora_request" if params.lora_scale is None else "lora_scale",
        )
    return LoRA(asked.name, _file_of(asked, config), scale)


def _file_of(asked: LoRARequest, config: OmniDiffusionConfig) -> str:
    path = asked.path or config.lora_modules.get(asked.name)
    if path is None:
        served = ", ".join(config.lora_modules) or "none"
        raise InvalidRequestError(
            f"there is no LoRA adapter {asked.name[:_MAX_ECHO]!r}; served: {served}", param="lora_request"
        )
    try:
        return str(adapter_file(path))
    except WrongValueError as error:
        raise InvalidRequestError(
            f"the path of a LoRA adapter takes {error}, got {path!r}", param="lora_request"
        ) from error
