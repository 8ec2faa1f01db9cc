"""The noise schedule of one request: diffusers' FlowMatchEulerDiscreteScheduler, which counts its steps itself."""

from __future__ import annotations

import copy

from diffusers import FlowMatchEulerDiscreteScheduler

from vllm_omni.diffusion.request import DiffusionRequest
from vllm_omni.diffusion.sampling import linear_sigmas, resolution_shift


def make_schedule(
    template: FlowMatchEulerDiscreteScheduler, request: DiffusionRequest, num_image_tokens: int
) -> FlowMatchEulerDiscreteScheduler:
    """A scheduler of the request alone, at its first step; `template` stays as it is."""
    scheduler = copy.deepcopy(template)
    config = scheduler.config
    mu = resolution_shift(
        num_image_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    sigmas = request.sigmas or linear_sigmas(request.num_inference_steps)
    if sigmas[-1] == 1:
        # A single step from noise to picture: there is no slope to stretch to the terminal (0 / 0).
        scheduler.register_to_config(shift_terminal=None)
    # On the CPU: its values are scalars of the step's arithmetic, which so waits for no transfer.
    scheduler.set_timesteps(sigmas=list(sigmas), mu=mu)
    scheduler.set_begin_index(0)
    return scheduler
