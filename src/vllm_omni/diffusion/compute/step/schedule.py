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
    Raises InvalidRequestError for a `flow_shift` that the scheduler does not take, and for NaN or infinite values.
    """
    scheduler = copy.deepcopy(template) if request.flow_shift is None else _with_shift(template, request.flow_shift)
    sigmas: Any = request.sigmas
    if sigmas is None and num_image_tokens is not None:
        sigmas = linear_sigmas(request.num_inference_steps)
    # On the CPU: a step uses the values as scalars, without a transfer from the device.
    with np.errstate(all="ignore"):  # the values are checked below
        scheduler.set_timesteps(
            None if sigmas is not None else request.num_inference_steps,
            sigmas=None if sigmas is None else np.array(sigmas),
            mu=None if num_image_tokens is None else _shift_of_size(scheduler.config, num_image_tokens),
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


def _with_shift(template: Any, shift: float) -> Any:
    """Copy of a scheduler with another shift of its sigmas. Raises InvalidRequestError if it takes none."""
    config = template.config
    if config.get("use_dynamic_shifting"):
        raise InvalidRequestError(
            f"flow_shift {shift:g}: this model's noise schedule is shifted by the size of the picture alone",
            param="flow_shift",
        )
    return type(template).from_config(config, **{"flow_shift" if "flow_shift" in config else "shift": shift})


def _shift_of_size(config: Any, num_image_tokens: int) -> float:
    return resolution_shift(
        num_image_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
