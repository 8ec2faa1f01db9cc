"""Sampling parameters that a request leaves out: from its adapters, from the server, from the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.inputs.field_values import shown

LENGTHS = {"num_frames", "seconds"}
"""Parameters of which a request has one."""


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping of several layers of defaults; the first layer with a value wins, also over what follows from it.

    A length in frames or seconds replaces the other one. Custom `sigmas` set the number of steps, and another number of
    steps replaces them. `lora_scale` belongs to the `lora_request` of its layer.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= {name: value for name, value in layer.items() if not _is_settled(name, value, merged)}
    return merged


def _is_settled(name: str, value: Any, above: Mapping[str, Any]) -> bool:
    """Whether the values `above` a default leave it without effect."""
    if name in above:
        return True
    if name in LENGTHS:
        return not LENGTHS.isdisjoint(above)
    if name == "num_inference_steps":
        return "sigmas" in above
    if name == "sigmas":
        return bool(above.get("num_inference_steps", len(value)) != len(value))
    return name == "lora_scale" and "lora_request" in above


def given_values(params: OmniDiffusionSamplingParams) -> dict[str, Any]:
    """Parameters that are not None, by name."""
    return {f.name: value for f in fields(params) if (value := getattr(params, f.name)) is not None}


def fill(params: OmniDiffusionSamplingParams, defaults: Mapping[str, Any]) -> OmniDiffusionSamplingParams:
    """Copy of `params` with defaults in place of None. Without a number of steps, it is the number of sigmas."""
    filled = params.filled_from(layered(given_values(params), defaults))
    if filled.num_inference_steps is None and filled.sigmas is not None:
        return replace(filled, num_inference_steps=len(filled.sigmas))
    return filled


def common_recipe(recipes: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults that the adapters of one request have together.

    recipes: name of each adapter -> its defaults. given: the values of the request, which settle a difference.
    Raises InvalidRequestError if two adapters differ in a parameter that the request leaves out.
    """
    common: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for name, recipe in recipes.items():
        for field, value in layered(given, recipe).items():
            if field in given:
                continue
            if common.setdefault(field, value) != value:
                raise _different(field, (owners[field], common[field]), (name, value))
            owners.setdefault(field, name)
    steps, sigmas = common.get("num_inference_steps"), common.get("sigmas")
    if steps is not None and sigmas is not None and steps != len(sigmas):
        count = (owners["sigmas"], f"{len(sigmas)} sigmas")
        raise _different("num_inference_steps", (owners["num_inference_steps"], steps), count)
    return common


def _different(field: str, *owners: tuple[str, Any]) -> InvalidRequestError:
    (first, its_value), (second, other) = owners
    return InvalidRequestError(
        f"{field}: the adapters {first!r} and {second!r} have different defaults, {shown(its_value)} and "
        f"{shown(other)}: give {field}",
        param=field,
    )
