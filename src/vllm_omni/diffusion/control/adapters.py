"""Adapters that a request asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.control.adapter_registry import AdapterRegistry
from vllm_omni.diffusion.data import MAX_LORAS, OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import LoRA
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.adapter_files import adapter_file, file_identity
from vllm_omni.inputs.data import LoRARequest, OmniDiffusionSamplingParams
from vllm_omni.inputs.field_values import WrongValueError, shown

MAX_SCALE = 100.0
MAX_ADAPTERS = MAX_LORAS
"""Most adapters of one request."""
_MAX_ECHO = 64
Item = TypeVar("Item", LoRARequest, float)


def resolve_loras(
    params: OmniDiffusionSamplingParams, config: OmniDiffusionConfig, info: ModelInfo, adapters: AdapterRegistry
) -> tuple[LoRA, ...]:
    """Find the adapters' files and scales: those of `lora_scale`, or else their own. Empty: the request asks for none.

    Raises InvalidRequestError for an adapter that is neither served nor has a path, for one that is given twice, for
    more than the device holds, and when the model takes none.
    """
    asked = _listed(params.lora_request)
    if not asked:
        if params.lora_scale is not None and params.lora_request is None:
            raise InvalidRequestError(f"lora_scale {shown(params.lora_scale)} needs a lora_request", param="lora_scale")
        return ()
    if info.why_no_adapters:
        raise InvalidRequestError(info.why_no_adapters, param="lora_request")
    if len(asked) > (most := min(MAX_ADAPTERS, config.num_device_loras)):
        limit = f" (--max-loras {most})" if most < MAX_ADAPTERS else ""
        raise InvalidRequestError(
            f"lora_request takes at most {most} adapters{limit}, got {len(asked)}", param="lora_request"
        )
    scales = _listed(params.lora_scale) or tuple(request.scale for request in asked)
    if len(scales) != len(asked):
        raise InvalidRequestError(
            f"lora_scale takes a number for each of the {len(asked)} adapters, got {shown(params.lora_scale)}",
            param="lora_scale",
        )
    for scale in scales:
        if not -MAX_SCALE <= scale <= MAX_SCALE:
            raise InvalidRequestError(
                f"the scale of a LoRA adapter takes a number from -{MAX_SCALE:g} to {MAX_SCALE:g}, got {scale!r}",
                param="lora_request" if params.lora_scale is None else "lora_scale",
            )
    found = [_file_of(request, config, adapters) for request in asked]
    loras = tuple(
        LoRA(request.name, file, scale, adapters.stamp(file)) for request, file, scale in zip(asked, found, scales)
    )
    _check_each_once(loras)
    return loras


def _check_each_once(loras: Sequence[LoRA]) -> None:
    """Raise InvalidRequestError if two adapters are one file, which may have two names."""
    names: dict[tuple[int, int] | str, str] = {}
    for lora in loras:
        first = names.get(file := file_identity(lora.path))
        if first is not None:
            got = f"{first[:_MAX_ECHO]!r} again"
            if first != lora.name:
                got = f"two names of one file, {first[:_MAX_ECHO]!r} and {lora.name[:_MAX_ECHO]!r}"
            raise InvalidRequestError(f"lora_request takes each adapter once, got {got}", param="lora_request")
        names[file] = lora.name


def recipes_of(
    params: OmniDiffusionSamplingParams, config: OmniDiffusionConfig, adapters: AdapterRegistry
) -> dict[str, Mapping[str, Any]]:
    """Defaults of the adapters that a request or else the server names, by the adapter's name.

    A file that a script brings has none.
    """
    given = params.lora_request
    asked = _listed(config.default_sampling_params.get("lora_request") if given is None else given)
    served = [adapter for lora in asked if lora.path is None and (adapter := adapters.get(lora.name)) is not None]
    return {adapter.name: adapter.defaults for adapter in served}


def default_adapters(config: OmniDiffusionConfig) -> tuple[str, ...]:
    """Served adapters of requests that name none."""
    asked = _listed(config.default_sampling_params.get("lora_request"))
    return tuple(lora.name for lora in asked if lora.path is None)


def _listed(value: Item | Sequence[Item] | None) -> tuple[Item, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _file_of(asked: LoRARequest, config: OmniDiffusionConfig, adapters: AdapterRegistry) -> str:
    """File of an adapter. A served one was found before: a request does not depend on where the file is now."""
    if (path := asked.path) is None:
        if (adapter := adapters.get(asked.name)) is not None:
            return adapter.file
        # A stored job names the adapters of the defaults, which may have paths.
        defaults = _listed(config.default_sampling_params.get("lora_request"))
        path = next((lora.path for lora in defaults if lora.path and lora.name == asked.name), None)
    if path is None:
        return adapters.require(asked.name).file
    return file_at(path)


def file_at(path: str | os.PathLike[str], param: str = "lora_request") -> str:
    """File of the adapter at a path that a caller gave. Raises InvalidRequestError."""
    try:
        return str(adapter_file(path))
    except WrongValueError as error:
        raise InvalidRequestError(f"the path of a LoRA adapter takes {error}, got {path!r}", param=param) from error
