"""Check of a model folder before anything is loaded: the error names the broken file. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_omni.diffusion.catalog.folder_files import MODEL_INDEX, check_links, names_in, read_object
from vllm_omni.diffusion.catalog.hub import hub_reason
from vllm_omni.diffusion.catalog.model_index import DIFFUSERS_STEMS, Component, read_components
from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.catalog.tokenizer_files import check_tokenizer
from vllm_omni.diffusion.catalog.weight_files import (
    CONFIG,
    StoredWeight,
    check_types,
    choose_all,
    has_weights,
    other_configs,
    shard_index,
    stored_weights,
)
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.field_values import shown

ADAPTER_CONFIG = "adapter_config.json"
GUIDER_CONFIG = "guider_config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
PROCESSOR_CONFIGS = ("preprocessor_config.json", "processor_config.json")
LAYER_WORDS = ("layers", "blocks", "depth")
"""Parts of the names of config.json's keys that give a number of layers."""
QUICK_LAYERS = 1000
"""Number of layers up to which building is fast, so that no comparison with the weight files is needed."""
MAX_TIMESTEPS = 2**20
"""Largest num_train_timesteps; a scheduler keeps several arrays of that length."""


def check_model_files(info: ModelInfo, config: OmniDiffusionConfig) -> None:
    """Raise ConfigError, with the file and the reason, for files that are missing, broken or do not fit the model.

    Also for a variant of the weights that no component has. With dummy weights, weight files are not checked,
    and those of a transformer whose weights are in a single file neither.
    """
    with hub_reason(info.path, info.hub_failure):
        path = info.path
        components = read_components(read_object(path, MODEL_INDEX))
        for component, entry in components.items():
            if not (path / component).is_dir():
                raise ConfigError(f"{MODEL_INDEX} names {component}, but the model has no folder {component}/")
            check_links(path, component)
            _check_files(info, component, entry)
        if config.load_format != "auto":
            return
        folders = {name: names_in(path, name) for name in components}
        for component in choose_all(components, folders, config.variant, config.transformer_files):
            weights = stored_weights(path / component, config.variant, components[component].stems)
            values = read_object(path, f"{component}/{CONFIG}")
            _check_counts(component, values, weights)
            if "quantization_config" not in values:
                check_types(component, weights)
            index = shard_index(path / component, config.variant, components[component].stems)
            for expected in info.expected_weights.get(component, ()):
                expected.check(component, weights, index)


def _check_files(info: ModelInfo, name: str, component: Component) -> None:
    """Raise ConfigError for missing or wrong files that configure the component `name`."""
    if component.kind == "tokenizer":
        check_tokenizer(info.path, name, component.class_name, info.tokenizer_needs)
        return
    names = names_in(info.path, name)
    for config in _configs(name, component, names):
        place = f"{name}/{config}"
        values = read_object(info.path, place)
        steps = values.get("num_train_timesteps")
        is_count = type(steps) is int and 1 <= steps <= MAX_TIMESTEPS
        if component.kind == "scheduler" and steps is not None and not is_count:
            raise ConfigError(
                f"{place}: num_train_timesteps takes a whole number from 1 to {MAX_TIMESTEPS}, got {shown(steps)}"
            )
        # Settings that make transformers read other weights than the checked ones.
        if config == CONFIG and info.served_by == "diffusers" and component.stems != DIFFUSERS_STEMS:
            if ADAPTER_CONFIG in names:
                raise ConfigError(f"{name}/ has an {ADAPTER_CONFIG}: adapters inside a component are not loaded")
            if (file := values.get("transformers_weights")) is not None:
                raise ConfigError(f"{name}/{CONFIG}: transformers_weights must be left out, got {shown(file)}")


def _configs(name: str, component: Component, names: list[str]) -> list[str]:
    """Files among `names` that configure the component. Raises ConfigError for a processor without such a file."""
    if has_weights(component, names):
        return [CONFIG]
    if component.kind == "scheduler":
        return [SCHEDULER_CONFIG]
    if component.kind == "guider":
        return [GUIDER_CONFIG]
    if component.kind is None:
        return other_configs(names)
    accepted = PROCESSOR_CONFIGS if component.library == "transformers" else (*PROCESSOR_CONFIGS, CONFIG)
    if present := [file for file in accepted if file in names]:
        return present
    raise ConfigError(f"{name}/ lacks {accepted[0]}")


def _check_counts(component: str, values: Mapping[str, Any], weights: Mapping[str, StoredWeight]) -> None:
    """Raise ConfigError for more layers than weights: otherwise the error comes after hours of building them."""
    most = max(len(weights), QUICK_LAYERS)
    for key, value in _numbers(values):
        if any(word in key for word in LAYER_WORDS) and value > most:
            raise ConfigError(
                f"{component}/{CONFIG}: {key} is {value}, but the weight files have only {len(weights)} weights"
            )


def _numbers(values: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers in a JSON value, each with the nearest key above it."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _numbers(value, name)
    elif isinstance(values, list):
        for value in values:
            yield from _numbers(value, key)
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield key, values
