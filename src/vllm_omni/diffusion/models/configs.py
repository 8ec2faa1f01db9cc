"""What is read off the configs of any family's model folder (no torch here)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.registry import Shares
from vllm_omni.diffusion.weight_files import read_object
from vllm_omni.errors import ConfigError


def read_config(path: Path, component: str, name: str = "config.json") -> dict[str, Any]:
    """The config of a component of the model in `path`. Raises ConfigError where it cannot be read."""
    return read_object(path / component / name)


def refuse_variants(transformer: Mapping[str, Any], only: Mapping[str, Any]) -> None:
    """Raise ConfigError for a transformer config that needs more than the family computes.

    only: key -> the value that is computed, which is also what an absent key means.
    """
    for key, available in only.items():
        if (value := transformer.get(key, available)) != available:
            raise ConfigError(f"transformer/config.json has {key}={value!r}: not available yet, only {available!r} is")


def refuse_scheduler(scheduler: Mapping[str, Any]) -> None:
    """Only what depends on nothing but the seed: a schedule that draws noise at every step is refused (ConfigError)."""
    name, only = scheduler.get("_class_name"), "FlowMatchEulerDiscreteScheduler"
    if name != only or scheduler.get("stochastic_sampling"):
        drawn = " with stochastic_sampling" if scheduler.get("stochastic_sampling") else ""
        raise ConfigError(
            f"scheduler/scheduler_config.json has {name}{drawn}: not available yet, only {only} without is"
        )


def text_encoder_shares(text_encoder: Mapping[str, Any]) -> Shares:
    """How many ranks can share the text encoder of this config.json.

    Raises ConfigError when the config does not say how large the model is.
    """
    # The language model's own section where there is one; older configs have its keys at the top.
    values = text_encoder.get("text_config") or text_encoder
    names = {
        "attention heads": "num_attention_heads",
        "key and value heads": "num_key_value_heads",
        "MLP channels": "intermediate_size",
    }
    try:
        return Shares({name: int(values[key]) for name, key in names.items()})
    except (KeyError, TypeError) as error:
        raise ConfigError(f"text_encoder/config.json does not say its sizes: {error!r}") from error
