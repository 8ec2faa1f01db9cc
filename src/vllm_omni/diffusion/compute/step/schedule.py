"""Noise schedules of diffusers' schedulers. Each request has a scheduler of its own, which counts its steps."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from vllm_omni.diffusion.compute.step.sampling import linear_sigmas, resolution_shift
from vllm_omni.diffusion.compute.step.unipc import FlowUniPC
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.errors import InvalidRequestError


def with_one_step_schedules(scheduler: Any) -> Any:
    """Copy of a diffusers scheduler whose one-step schedules are finite; `scheduler` itself without `shift_terminal`.

    With `shift_terminal`, sigmas are stretched to end there: 1 - (1 - sigma) / scale with
    scale = (1 - last) / (1 - shift_terminal). A schedule of one step has last = 1, and diffusers divides by zero:
    here it stays a single step from noise to picture.
    """
    cls = type(scheduler)
    if not hasattr(cls, "stretch_shift_to_terminal"):
        return scheduler

    def stretch_shift_to_terminal(self: Any, t: np.ndarray) -> np.ndarray:
        stretched: np.ndarray = t if t[-1] == 1 else cls.stretch_shift_to_terminal(self, t)
        return stretched

    # Pipelines look at the names of their components' classes.
    members = {"stretch_shift_to_terminal": stretch_shift_to_terminal, "__module__": cls.__module__}
    subclass: Any = type(cls.__name__, (cls,), members)
    return subclass.from_config(scheduler.config)


def check_schedule(scheduler: Any, request: DiffusionRequest) -> None:
    """Raise InvalidRequestError for a schedule with NaN or infinite values. Waits for the device that holds them."""
    for name in ("sigmas", "timesteps"):
        values = getattr(scheduler, name, None)
        if isinstance(values, torch.Tensor) and not bool(values.isfinite().all()):
            raise _refusal(request, f"values that are not numbers, by {type(scheduler).__name__}")


def make_schedule(template: Any, request: DiffusionRequest, num_image_tokens: int | None = None) -> Any:
    """diffusers' scheduler for one request, at its first step.

    template: from `with_one_step_schedules`; not changed. num_image_tokens: the schedule is linear before its shift,
    which may depend on the size of the picture; None: the schedule that the scheduler makes by itself.
    A request's `flow_shift` replaces the scheduler's own shift, also one by the size of the picture.
    Raises InvalidRequestError for a `flow_shift` if the scheduler has none, and for NaN or infinite values.
    """
    scheduler = copy.deepcopy(template) if request.flow_shift is None else with_shift(template, request.flow_shift)
    mu = None
    if num_image_tokens is not None and scheduler.config.get("use_dynamic_shifting"):
        mu = _shift_of_size(scheduler.config, num_image_tokens)
    sigmas: Any = request.sigmas
    if sigmas is None and num_image_tokens is not None:
        sigmas = linear_sigmas(request.num_inference_steps)
    # On the CPU: a step uses the values as scalars, without a transfer from the device.
    with np.errstate(all="ignore"):  # the values are checked below
        scheduler.set_timesteps(
            None if sigmas is not None else request.num_inference_steps,
            sigmas=None if sigmas is None else np.array(sigmas),
            mu=mu,
        )
    check_schedule(scheduler, request)
    if isinstance(scheduler, FlowUniPC) and not scheduler.has_falling_levels():
        raise _refusal(request, "noise levels that do not fall")
    scheduler.set_begin_index(0)
    return scheduler


def _refusal(request: DiffusionRequest, fault: str) -> InvalidRequestError:
    """Error for a schedule with `fault`; names the parameter that decided it."""
    given = {"sigmas": request.sigmas, "flow_shift": request.flow_shift}
    named = {name: value for name, value in given.items() if value is not None}
    named = named or {"num_inference_steps": request.num_inference_steps}
    text = " and ".join(f"{name} {value}" for name, value in named.items())
    verb = "makes" if len(named) == 1 else "make"
    return InvalidRequestError(f"{text} {verb} a noise schedule with {fault}", param=next(iter(named)))


def with_shift(scheduler: Any, shift: float) -> Any:
    """Scheduler like this one of diffusers, whose sigmas become shift * sigma / (1 + (shift - 1) * sigma).

    Nothing else changes them: neither the size of the picture, nor the scheduler's `shift_terminal`, which belongs to
    the shift by the size. The shift exp(mu) equals the dynamic shift `mu` of every size.
    Raises InvalidRequestError if the scheduler has no shift.
    """
    config = scheduler.config
    name = next((name for name in ("flow_shift", "shift") if name in config), None)
    if name is None:
        raise InvalidRequestError(
            f"flow_shift {shift:g}: this model's {type(scheduler).__name__} has no shift", param="flow_shift"
        )
    changes = {name: shift, "use_dynamic_shifting": False, "shift_terminal": None}
    return type(scheduler).from_config(config, **{key: value for key, value in changes.items() if key in config})


def _shift_of_size(config: Any, num_image_tokens: int) -> float:
    return resolution_shift(
        num_image_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
