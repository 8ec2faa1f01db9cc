"""Checks of default parameters when they are set: of the server, of the model, and of adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from threading import Lock
from typing import Any

from vllm_omni.diffusion.catalog.folder_files import ADAPTERS_FILE, DEFAULTS_FILE
from vllm_omni.diffusion.catalog.model_adapters import with_model_adapters
from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.control.adapter_registry import AdapterRegistry
from vllm_omni.diffusion.control.adapters import resolve_loras
from vllm_omni.diffusion.control.default_values import fill, layered
from vllm_omni.diffusion.control.request_builder import (
    check_supported,
    check_text,
    check_values,
    count_tokens,
)
from vllm_omni.diffusion.data import OmniDiffusionConfig, fit_adapter_defaults, flag_of
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt
from vllm_omni.inputs.field_values import shown


def check_defaults(config: OmniDiffusionConfig, info: ModelInfo) -> None:
    """Raise ConfigError for settings under which every request that relies on the defaults would fail.

    The length of the default negative prompt needs the tokenizer: see `check_default_prompt`.
    """
    values = dict(config.default_sampling_params)
    prompt = OmniPrompt("", values.pop("negative_prompt", None))
    try:
        params = OmniDiffusionSamplingParams(**values)
        check_supported(prompt, params, info)
        check_values(fill(params, info.default_sampling_params), config, info)
        resolve_loras(params, config, info, AdapterRegistry(config))
    except InvalidRequestError as error:
        raise ConfigError(_blame(error, config, info)) from error
    for name, recipe in config.lora_defaults.items():
        try:
            check_recipe(name, recipe, _place(name, config, info), config, info)
        except InvalidRequestError as error:
            raise ConfigError(str(error)) from error


def with_fitting_adapters(config: OmniDiffusionConfig, info: ModelInfo) -> tuple[OmniDiffusionConfig, list[str]]:
    """Config that also serves the adapters of the model's folder, and a line about each of them that is left out: a
    flag of this server forbids a value of its recipe.

    Raises ConfigError for a wrong `adapters.json`, values that no server takes included.
    """
    served = with_model_adapters(config, info)
    left_out: dict[str, str] = {}
    for name in served.lora_modules.keys() - config.lora_modules.keys():
        if (recipe := served.lora_defaults.get(name)) is None:
            continue
        try:
            check_recipe(name, recipe, f"the model's own {ADAPTERS_FILE}", served, info)
        except InvalidRequestError as error:
            if not any(flag_of(setting) in str(error) for setting in _LIMITING_SETTINGS):
                raise ConfigError(str(error)) from error
            left_out[name] = f"{error}: the adapter is not served"
    config = replace(
        served,
        lora_modules={name: file for name, file in served.lora_modules.items() if name not in left_out},
        lora_defaults={name: recipe for name, recipe in served.lora_defaults.items() if name not in left_out},
    )
    return config, [left_out[name] for name in sorted(left_out)]


def check_recipe(
    name: str, recipe: Mapping[str, Any], place: str, config: OmniDiffusionConfig, info: ModelInfo
) -> dict[str, Any]:
    """Defaults of the adapter `name` as plain values. place: where they were given, for errors.

    Raises InvalidRequestError for parameters that the model does not take, and for values that no request may have.
    """
    try:
        fitted = fit_adapter_defaults(name, recipe, place)
    except ConfigError as error:
        raise InvalidRequestError(str(error), param="defaults") from error
    values = dict(fitted)
    prompt = OmniPrompt("", values.pop("negative_prompt", None))
    beneath = layered(config.default_sampling_params, info.default_sampling_params)
    try:
        params = OmniDiffusionSamplingParams(**values)
        check_supported(prompt, params, info)
        check_text("negative_prompt", prompt.negative_prompt or "")
        check_values(fill(params, beneath), config, info)
    except InvalidRequestError as error:
        text = f"{place}: defaults of the LoRA adapter {shown(name)}: {error}"
        raise InvalidRequestError(text, param="defaults") from error
    return fitted


def check_default_prompt(config: OmniDiffusionConfig, info: ModelInfo) -> None:
    """Raise ConfigError for a default negative prompt that is too long, also one that an adapter brings.

    Loads the tokenizer, which takes seconds.
    """
    server = layered(config.default_sampling_params, info.default_sampling_params)
    recipes = {f"{_place(name, config, info)} {name}": recipe for name, recipe in config.lora_defaults.items()}
    for place, defaults in {"--default-sampling-params": {}, **recipes}.items():
        try:
            _check_tokens(layered(defaults, server), info)
        except InvalidRequestError as error:
            raise ConfigError(f"{place}: {error}") from error


def check_loaded_recipe(
    name: str, recipe: Mapping[str, Any], config: OmniDiffusionConfig, info: ModelInfo, tokenizing: Lock
) -> dict[str, Any]:
    """`check_recipe` of an adapter that is loaded now, with the length of its negative prompt.

    tokenizing: of the `RequestBuilder`, held while tokens are counted. Loads the tokenizer, which takes seconds.
    """
    recipe = check_recipe(name, recipe, "load_lora", config, info)
    if recipe.get("negative_prompt") is None:
        return recipe
    try:
        with tokenizing:
            _check_tokens(layered(recipe, config.default_sampling_params, info.default_sampling_params), info)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"defaults: {error}", param="defaults") from error
    return recipe


def _check_tokens(values: Mapping[str, Any], info: ModelInfo) -> None:
    text, limit = values.get("negative_prompt"), values.get("max_sequence_length")
    count_tokens("prompt" if text is None else "negative_prompt", text or "", limit, info)


def _place(name: str, config: OmniDiffusionConfig, info: ModelInfo) -> str:
    """Where the adapter was given, for errors: by a flag, or by the model's folder itself."""
    is_own = config.lora_modules.get(name, "").startswith(f"{info.path}{os.sep}")
    return (
        f"the model's own {ADAPTERS_FILE}" if is_own and os.path.exists(info.path / ADAPTERS_FILE) else "--lora-modules"
    )


_LIMITS = {
    "height": "max_pixels",
    "width": "max_pixels",
    "num_inference_steps": "max_inference_steps",
    "num_frames": "max_num_frames",
    "seconds": "max_num_frames",
}
"""Parameter -> the setting that limits it."""
_LIMITING_SETTINGS = {*_LIMITS.values(), "cache_backend", "max_num_queued_reqs"}
"""Settings by which a server may forbid values that the model takes."""


def _blame(error: InvalidRequestError, config: OmniDiffusionConfig, info: ModelInfo) -> str:
    """Message for a default that is refused: the place where it was set, or the limit that the model's own exceeds."""
    given = set(config.default_sampling_params)
    if "sigmas" in given:
        given.add("num_inference_steps")  # it follows from their number
    limit = _LIMITS.get(error.param or "")
    if error.param in given or (limit == "max_pixels" and given & {"height", "width"}):
        return f"--default-sampling-params: {error}"
    if limit and flag_of(limit) in str(error):
        return f"{flag_of(limit)} {getattr(config, limit)} refuses the model's own default: {error}"
    if os.path.lexists(info.path / DEFAULTS_FILE):
        return f"the model's own {DEFAULTS_FILE}: {error}"
    return f"the model's own default, which follows from its configs: {error}; write others to its {DEFAULTS_FILE}"
