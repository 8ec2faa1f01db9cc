"""A scheduler and the runner of one rank in one process, without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from testbed.fakes import make_config, make_ready
from tests.diffusion.compute.worker.replica import merging
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.control.scheduled_request import RequestCost, ScheduledRequest
from vllm_omni.diffusion.control.scheduler import Scheduler
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.checkpoint import Checkpoint
from vllm_omni.diffusion.messages.plan import ItemError, StepPlan
from vllm_omni.diffusion.messages.request import DiffusionRequest


class Replica:
    """A scheduler and the runner of one rank; all ranks of a replica make the same plans.

    A piece of a video has one latent frame, in an encode as in a decode.
    """

    def __init__(self, runner: ModelRunner, parallel: DiffusionParallelConfig) -> None:
        self.runner = runner
        config = make_config(scheduling_policy="fcfs", parallel=parallel)
        # A unit takes a second, so one latent frame is a piece.
        self.scheduler = Scheduler(config, make_ready(max_batch_tokens=10**6, seconds_per_unit=1.0))
        self._merge = merging(self.runner)
        self.plans: list[StepPlan] = []
        self.frames: dict[str, list[np.ndarray]] = {}
        self.images: dict[str, np.ndarray] = {}
        self.previews: dict[str, np.ndarray] = {}
        self.errors: dict[str, ItemError] = {}
        self.checkpoints: dict[str, list[Checkpoint]] = {}
        self.made_here: set[str] = set()
        """Videos of which this rank gave frames."""

    def add(self, requests: Sequence[DiffusionRequest], **values: Any) -> None:
        for request in requests:
            num_encoded_frames = self.runner._info.num_encoded_frames(request.images, request.num_frames)
            self.scheduler.add([scheduled(request, **{"num_encoded_frames": num_encoded_frames} | values)])

    def step(self) -> bool:
        """Run the next plan; False when there is none."""
        if (plan := self.scheduler.schedule()) is None:
            return False
        self.plans.append(plan)
        own = self.runner.execute(plan)
        self.made_here |= own.frames.keys()
        result = self._merge(own)
        update = self.scheduler.update(result, 0.01)
        for request_id in update.frames:
            self.frames.setdefault(request_id, []).append(result.frames[request_id])
        for request_id, checkpoint in update.checkpoints.items():
            assert checkpoint is not None
            self.checkpoints.setdefault(request_id, []).append(checkpoint)
        self.images |= result.images
        self.previews |= result.previews
        self.errors |= update.failed
        return True

    def run(self) -> dict[str, np.ndarray]:
        """Run all plans; pixels of each request that succeeded."""
        while self.step():
            pass
        return self.images | {i: np.concatenate(parts) for i, parts in self.frames.items() if i not in self.errors}


def scheduled(request: DiffusionRequest, **values: Any) -> ScheduledRequest:
    num_latent_frames = 1 + (request.num_frames - 1) // 4
    decode = float(num_latent_frames)
    encode_video = decode if values.get("num_encoded_frames", 1) > 1 else 0.0
    cost = RequestCost(1.0 + encode_video, 10.0, decode, (10,) * (1 + request.has_guidance), encode_video)
    return ScheduledRequest(request, cost, 1, 10, num_latent_frames=num_latent_frames, **values)
