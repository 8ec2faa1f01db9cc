"""Flags of LoRA adapters: the forms of `--lora-modules`, and which of them go together."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_omni.entrypoints import vllm_api
from vllm_omni.entrypoints.cli.flag_types import json_objects
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.adapter_names import check_adapter_name
from vllm_omni.inputs.field_values import WrongValueError, shown

logger = logging.getLogger(__name__)

_TAKES = 'NAME=PATH or {"name": NAME, "path": PATH, "defaults": {PARAMETER: VALUE}}'
_FIELDS = {"name", "path", "defaults", "base_model_name", "is_3d_lora_weight"}


@dataclass(frozen=True)
class LoRAModule:
    """One adapter of `--lora-modules`."""

    name: str
    path: str
    defaults: Mapping[str, Any]
    """Sampling parameters for requests that name the adapter and do not give them."""
    base_model_name: str | None
    """Model that the adapter is for, by a name that requests may use; None: the served model."""


def lora_modules(text: str) -> list[LoRAModule]:
    """Adapters from NAME=PATH, or from vLLM's form: a JSON object, or a JSON list of objects.

    Raises ArgumentTypeError.
    """
    if text.startswith(("{", "[")):
        return [_module(values, text) for values in json_objects(text)]
    name, _, path = text.partition("=")
    return [_module({"name": name, "path": path}, text)]


def _module(values: Mapping[str, Any], text: str) -> LoRAModule:
    name, path, defaults = values.get("name"), values.get("path"), values.get("defaults", {})
    base_model_name = values.get("base_model_name")
    is_good = (
        set(values) <= _FIELDS
        and all(isinstance(value, str) and value for value in (name, path))
        and isinstance(defaults, dict)
        and isinstance(base_model_name, str | None)
        and values.get("is_3d_lora_weight", False) is False  # vLLM's layout for mixtures of experts
    )
    if not is_good:
        raise argparse.ArgumentTypeError(f"takes {_TAKES}, got {shown(text)}")
    try:
        check_adapter_name(name)
    except WrongValueError as error:
        raise argparse.ArgumentTypeError(f"takes {error}, got {shown(name)}") from error
    return LoRAModule(str(name), str(path), defaults, base_model_name)


def adapter_settings(given: Mapping[str, Any], model_names: Sequence[str]) -> dict[str, Any]:
    """Fields of `OmniDiffusionConfig` from the flags of adapters. `given`: the parsed values of all flags.

    Raises ConfigError for names that are not unique, and for flags that need each other.
    """
    modules: list[LoRAModule] = [module for part in given["lora_modules"] or [] for module in part]
    names = [*model_names, *(module.name for module in modules)]
    for module in modules:
        if names.count(module.name) > 1:
            raise ConfigError(f"--lora-modules takes a name once, and none of the model's, got {module.name!r}")
        if module.base_model_name not in (None, *model_names):
            raise ConfigError(
                f"--lora-modules {module.name}: base_model_name takes a served name ({', '.join(model_names)}), got "
                f"{module.base_model_name!r}"
            )
    return {
        "lora_modules": {module.name: module.path for module in modules},
        "lora_defaults": {module.name: module.defaults for module in modules if module.defaults},
        "enable_lora_loading": _may_load(given),
    }


def _may_load(given: Mapping[str, Any]) -> bool:
    """Whether adapters may be loaded over HTTP: vLLM's variable counts where the flag is not given."""
    flag = given["enable_lora_loading"]
    if not (vllm_api.allows_lora_updates() if flag is None else flag):
        return False
    if not given["lora_dirs"]:
        needs = "needs --lora-dir, the folders from which adapters may be loaded"
        if flag:
            raise ConfigError(f"--enable-lora-loading {needs}")
        logger.warning("%s=1 %s: clients load none", vllm_api.LORA_UPDATES_VARIABLE, needs)  # set for other servers
        return False
    return True
