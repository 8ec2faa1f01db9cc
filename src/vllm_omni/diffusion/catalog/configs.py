"""Configs in a model folder: values with checked types, for any family. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from vllm_omni.diffusion.catalog.folder_files import read_object
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.field_values import shown

MAX_SIZE = 2**20
"""Largest whole number in a config; no device holds wider layers."""
MAX_LAYERS = 10_000
TIMESTEP_CHANNELS = 256
"""Length of the sinusoidal embedding of a timestep: see `layers/timesteps.py`."""

Values = TypeVar("Values")


def read_config(path: Path, component: str, name: str = "config.json") -> dict[str, Any]:
    """Config file of a component of the model in `path`. Raises ConfigError if it cannot be read."""
    return read_object(path, f"{component}/{name}" if component else name)


def from_values(cls: type[Values], values: Mapping[str, Any], place: str) -> Values:
    """Instance of the dataclass `cls` from the keys of a config that are its fields; other keys are ignored.

    A number of layers may be 1 to MAX_LAYERS, other whole numbers 1 to MAX_SIZE. Raises ConfigError, with `place` (the
    config's file) and the key, for a value of another type or size, and for a missing key without default.
    """
    types = get_type_hints(cls)
    named = {}
    for field in fields(cls):  # type: ignore[arg-type]  # a dataclass
        if field.name in values:
            named[field.name] = _converted(values[field.name], types[field.name], f"{place}: {field.name}")
    try:
        return cls(**named)
    except TypeError as error:
        raise ConfigError(f"{place} does not say its sizes: {error}") from error


def _converted(value: Any, kind: Any, place: str) -> Any:
    """Convert a JSON value to the type `kind` of a dataclass's field. Raises ConfigError."""
    options = get_args(kind)
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not value:
            raise ConfigError(f"{place} takes a list that is not empty, got {shown(value)}")
        return tuple(_converted(item, options[0], place) for item in value)
    if NoneType in options:
        return None if value is None else _converted(value, options[0], place)
    if kind is int:
        most = MAX_LAYERS if "layers" in place or place.endswith(("depth", "res_blocks")) else MAX_SIZE
        if type(value) is not int or not 1 <= value <= most:
            raise ConfigError(f"{place} takes a whole number from 1 to {most}, got {shown(value)}")
    elif kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise ConfigError(f"{place} takes a number, got {shown(value)}")
    elif not isinstance(value, kind):
        raise ConfigError(f"{place} takes {'true or false' if kind is bool else 'a text'}, got {shown(value)}")
    return value


def check_config_values(transformer: Mapping[str, Any], only: Mapping[str, Any]) -> None:
    """Raise ConfigError for a transformer config with values that the family does not compute.

    `only`: key -> the one value that the family computes, which is also the meaning of an absent key.
    """
    for key, available in only.items():
        if (value := transformer.get(key, available)) != available:
            raise ConfigError(f"transformer/config.json has {key}={value!r}: not available yet, only {available!r} is")


@dataclass(frozen=True)
class SchedulerConfig:
    """Keys of scheduler/scheduler_config.json that diffusers' FlowMatchEulerDiscreteScheduler uses."""

    num_train_timesteps: int = 1000
    shift: float = 1.0
    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: int | None = 256
    max_image_seq_len: int | None = 4096
    shift_terminal: float | None = None
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"


def read_scheduler_config(path: Path) -> SchedulerConfig:
    """Config of the scheduler of the model in `path`.

    Raises ConfigError for other schedulers, for one that draws noise at every step, and for values of wrong types.
    """
    place = "scheduler/scheduler_config.json"
    values = read_object(path, place)
    name, only = values.get("_class_name"), "FlowMatchEulerDiscreteScheduler"
    if name != only or values.get("stochastic_sampling"):
        drawn = " with stochastic_sampling" if values.get("stochastic_sampling") else ""
        raise ConfigError(f"{place} has {name}{drawn}: not available yet, only {only} without is")
    config = from_values(SchedulerConfig, values, place)
    if config.time_shift_type not in (kinds := ("exponential", "linear")):
        raise ConfigError(f"{place}: time_shift_type takes {' or '.join(kinds)}, got {config.time_shift_type!r}")
    return config
