"""Adapters that a model folder brings itself, by its file `adapters.json`. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.catalog.folder_files import ADAPTERS_FILE, read_object, regular_file
from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.data import OmniDiffusionConfig, fit_adapter_defaults
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.adapter_names import check_adapter_name
from vllm_omni.inputs.field_values import WrongValueError, shown

_TAKES = '{NAME: {"path": FILE, "defaults": {PARAMETER: VALUE}}} with files of the model folder'


def with_model_adapters(config: OmniDiffusionConfig, info: ModelInfo) -> OmniDiffusionConfig:
    """Config that also serves the adapters of the model's folder, if the model takes any. An adapter of
    `--lora-modules` replaces one of the folder with its name, defaults included.

    Raises ConfigError for a wrong `adapters.json`.
    """
    if info.why_no_adapters:
        return config
    own = {name: value for name, value in _entries(info.path).items() if name not in config.lora_modules}
    if not own:
        return config
    paths = {name: str(regular_file(info.path, value["path"])) for name, value in own.items()}
    defaults = {name: value["defaults"] for name, value in own.items() if value.get("defaults")}
    return replace(
        config,
        lora_modules={**config.lora_modules, **paths},
        lora_defaults={**config.lora_defaults, **defaults},
    )


def _entries(folder: Path) -> dict[str, Mapping[str, Any]]:
    if not os.path.lexists(folder / ADAPTERS_FILE):  # a link to nothing is told
        return {}
    entries = read_object(folder, ADAPTERS_FILE)
    for name, value in entries.items():
        is_good = isinstance(value, dict) and {"path"} <= set(value) <= {"path", "defaults"}
        if not is_good or not isinstance(value["path"], str) or not isinstance(value.get("defaults", {}), dict):
            raise ConfigError(f"{ADAPTERS_FILE} takes {_TAKES}, got {shown({name: value})}")
        try:
            check_adapter_name(name)
        except WrongValueError as error:
            raise ConfigError(f"{ADAPTERS_FILE} takes {error}, got {shown(name)}") from error
        fit_adapter_defaults(name, value.get("defaults", {}), ADAPTERS_FILE)
        if not regular_file(folder, value["path"]).is_file():
            raise ConfigError(f"{ADAPTERS_FILE}: {name}: the model folder has no file {value['path']}")
    return entries
