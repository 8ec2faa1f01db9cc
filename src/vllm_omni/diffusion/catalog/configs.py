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

EULER, UNIPC = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"
"""diffusers' classes of the noise schedulers that packed families step with."""
_SHIFTED = (EULER, "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
_SHIFTED_WITH_FLOW_SIGMAS = (UNIPC, "DPMSolverMultistepScheduler")
"""diffusers' classes whose schedules have a shift: always, and with `use_flow_sigmas`."""

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
    """Raise ConfigError if a key has another value than in `only`, which is also the meaning of an absent key."""
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


@dataclass(frozen=True)
class UniPCConfig:
    """Keys of scheduler/scheduler_config.json that diffusers' UniPCMultistepScheduler uses for flow matching."""

    num_train_timesteps: int = 1000
    solver_order: int = 2
    solver_type: str = "bh2"
    flow_shift: float = 1.0
    shift_terminal: float | None = None
    prediction_type: str = "epsilon"
    use_flow_sigmas: bool = False
    predict_x0: bool = True
    thresholding: bool = False
    lower_order_final: bool = True
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_dynamic_shifting: bool = False
    final_sigmas_type: str = "zero"


_UNIPC_VALUES: Mapping[str, tuple[Any, ...]] = {
    "solver_order": (1, 2, 3),
    "solver_type": ("bh2",),  # with bh1 the last step divides infinity by infinity
    "prediction_type": ("flow_prediction",),
    "use_flow_sigmas": (True,),
    "predict_x0": (True,),
    "thresholding": (False,),
    "lower_order_final": (True,),
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "final_sigmas_type": ("zero",),
}
"""Keys of a UniPCConfig and the values of each that packed families step with."""
MIN_FLOW_SHIFT = 0.01
"""Least shift of a noise schedule; with far less, noise levels are equal in float32."""
SCHEDULER_PLACE = "scheduler/scheduler_config.json"


def read_scheduler_config(path: Path) -> SchedulerConfig:
    """Config of the scheduler of the model in `path`, whose shift the family computes from the size of the picture.

    Raises ConfigError for other schedulers, for one that draws noise at every step, and for values of wrong types.
    """
    values = read_object(path, SCHEDULER_PLACE)
    name = values.get("_class_name")
    if name != EULER or values.get("stochastic_sampling"):
        drawn = " with stochastic_sampling" if values.get("stochastic_sampling") else ""
        raise ConfigError(f"{SCHEDULER_PLACE} has {name}{drawn}: not available yet, only {EULER} without is")
    config = from_values(SchedulerConfig, values, SCHEDULER_PLACE)
    _check_among("time_shift_type", config.time_shift_type, ("exponential", "linear"))
    return config


def takes_flow_shift(class_name: str, values: Mapping[str, Any]) -> bool:
    """Whether a request may set the shift of this scheduler of diffusers. values: the scheduler's config."""
    return class_name in _SHIFTED or (class_name in _SHIFTED_WITH_FLOW_SIGMAS and values.get("use_flow_sigmas") is True)


def read_own_schedule(path: Path) -> SchedulerConfig | UniPCConfig:
    """Config of the scheduler of the model in `path`, which makes its noise schedule by itself.

    Raises ConfigError for other schedulers, for variants that packed families do not step with, and for a shift that
    depends on the size of the picture.
    """
    values = read_object(path, SCHEDULER_PLACE)
    if (name := values.get("_class_name")) not in (EULER, UNIPC):
        raise ConfigError(f"{SCHEDULER_PLACE} has {name}: not available yet, only {EULER} and {UNIPC} are")
    if name == EULER:
        config = read_scheduler_config(path)
        _check_among("use_dynamic_shifting", config.use_dynamic_shifting, (False,))
        return config
    unipc = from_values(UniPCConfig, values, SCHEDULER_PLACE)
    for key, accepted in _UNIPC_VALUES.items():
        _check_among(key, getattr(unipc, key), accepted)
    if values.get("solver_p") is not None:
        raise ConfigError(f"{SCHEDULER_PLACE}: solver_p must be left out, got {shown(values['solver_p'])}")
    if unipc.flow_shift < MIN_FLOW_SHIFT:
        raise ConfigError(
            f"{SCHEDULER_PLACE}: flow_shift takes a number from {MIN_FLOW_SHIFT}, got {unipc.flow_shift:g}"
        )
    return unipc


def _check_among(key: str, value: Any, accepted: tuple[Any, ...]) -> None:
    if value not in accepted:
        raise ConfigError(f"{SCHEDULER_PLACE}: {key} takes {' or '.join(map(str, accepted))}, got {value!r}")
