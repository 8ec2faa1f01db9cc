"""Check of a model folder before anything is loaded: a broken file is one line with its name. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.folder_files import MODEL_INDEX, names_in, read_object
from vllm_omni.diffusion.hub import blame_hub
from vllm_omni.diffusion.registry import ModelInfo
from vllm_omni.diffusion.tokenizer_files import check_tokenizer
from vllm_omni.diffusion.weight_files import choose_all, has_weights, read_components
from vllm_omni.diffusion.weight_headers import StoredWeight, check_types, stored_weights
from vllm_omni.errors import ConfigError

CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
PROCESSOR_CONFIGS = ("preprocessor_config.json", "processor_config.json")
LAYER_WORDS = ("layers", "blocks", "depth")
"""Parts of the names of config.json's keys that say how many modules are built."""
MOST_LAYERS = 1000
"""Number of layers that is built in a moment, whatever the weight files hold."""


def check_model(info: ModelInfo, config: OmniDiffusionConfig) -> None:
    """Raise ConfigError, with the file and the reason, for files of the model that are missing, broken or do not fit.

    Also for a variant of the weights that no component has. With dummy weights no weight file is looked at.
    """
    with blame_hub(info.path, info.hub_failure):
        _check_folder(info, config)


def _check_folder(info: ModelInfo, config: OmniDiffusionConfig) -> None:
    path = info.path
    components = read_components(read_object(path, MODEL_INDEX))
    for component, class_name in components.items():
        if not (path / component).is_dir():
            raise ConfigError(f"{MODEL_INDEX} names {component}, but the model has no folder {component}/")
        _check_files(info, component, class_name)
    if config.load_format != "auto":
        return
    models = [component for component, class_name in components.items() if has_weights(class_name)]
    choose_all({component: names_in(path, component) for component in models}, config.variant)
    for component in models:
        weights = stored_weights(path / component, config.variant)
        values = read_object(path, f"{component}/{CONFIG}")
        _check_counts(component, values, weights)
        if "quantization_config" not in values:
            check_types(component, weights)
        for expected in info.expected_weights.get(component, ()):
            expected.check(component, weights)


def _check_files(info: ModelInfo, component: str, class_name: str) -> None:
    """Raise ConfigError for files that configure a component."""
    names = names_in(info.path, component)
    if has_weights(class_name):
        read_object(info.path, f"{component}/{CONFIG}")
    elif "Tokenizer" in class_name:
        check_tokenizer(info.path, component, info.tokenizer_needs)
    elif "Scheduler" in class_name:
        read_object(info.path, f"{component}/{SCHEDULER_CONFIG}")
    elif present := [name for name in PROCESSOR_CONFIGS if name in names]:
        for name in present:
            read_object(info.path, f"{component}/{name}")
    else:
        raise ConfigError(f"{component}/ lacks {PROCESSOR_CONFIGS[0]}")


def _check_counts(component: str, values: Mapping[str, Any], weights: Mapping[str, StoredWeight]) -> None:
    """Raise ConfigError for more layers than there are weights: building them would take hours before that shows."""
    most = max(len(weights), MOST_LAYERS)
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
