"""Calibration of TeaCache: run requests step by step and record how much each step changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_omni.diffusion.compute.cache.calibration import Change, ChangeRecorder
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.messages.request import DiffusionRequest


@torch.inference_mode()
def measure_changes(runner: ModelRunner, requests: Sequence[DiffusionRequest]) -> list[Change]:
    """Changes from step to step of every guidance branch of `requests`. Raises any error of the model."""
    pipeline = runner.pipeline
    pipeline.step_cache = recorder = ChangeRecorder(Group.alone())
    for request in requests:
        state = pipeline.encode(request)
        for _ in range(request.num_inference_steps):
            (branches,) = pipeline.predict([state])
            pipeline.advance(state, branches)
            state.settle()
        pipeline.forget(state)
    return recorder.changes
