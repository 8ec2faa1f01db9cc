"""Drive a ModelRunner as a scheduler would, with requests joining at given steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.compute.startup.model_start import StartOptions
from vllm_omni.diffusion.compute.startup.warmup import StepBudget
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.control.executor import Executor, make_executor
from vllm_omni.diffusion.control.executor.inline import InlineExecutor
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import ItemError, StepPlan, StepResult
from vllm_omni.diffusion.messages.request import DiffusionRequest

Requested = TypeVar("Requested", bound=DiffusionRequest)
QUICK = StartOptions(budget=StepBudget(cpu_seconds=0.0, gpu_seconds=0.0, min_samples=1))
"""A start that measures one size of step only."""


def quick_executor(config: OmniDiffusionConfig, info: ModelInfo, *rest: Any) -> Executor:
    """The executor of a config like `make_executor`, but a worker in this process has a `QUICK` start."""
    executor = make_executor(config, info, *rest)
    if isinstance(executor, InlineExecutor):
        return InlineExecutor(lambda: ModelRunner(config, info, options=QUICK))
    return executor


def fitted(request: Requested, info: ModelInfo) -> Requested:
    """The request with its pictures as the front end sends them."""
    images = (info.fit_image(image, request.height, request.width) for image in request.images)
    return replace(request, images=tuple(images))


@dataclass(frozen=True)
class DrivenRequest(DiffusionRequest):
    """A request and the steps after which `Drive` asks for a preview."""

    preview_steps: tuple[int, ...] = ()


def make_request(request_id: str, prompt: str = "a red apple", **changes: Any) -> DrivenRequest:
    """A request without guidance, or with a scale of 4 where `changes` has a negative prompt and no scale."""
    fields: dict[str, Any] = {
        "height": 64,
        "width": 64,
        "num_inference_steps": 4,
        "true_cfg_scale": 1.0 if changes.get("negative_prompt") is None else 4.0,
        "seed": 0,
        "max_sequence_length": 512,
        "cache": True,
    }
    return DrivenRequest(request_id=request_id, prompt=prompt, **(fields | changes))


@contextmanager
def scheduler_of(pipeline: Any, request: DiffusionRequest) -> Iterator[None]:
    """Let a pipeline of diffusers have the shift of the request, by the config of its noise scheduler.

    For a shift by size it is the config that is published with distilled adapters of Qwen-Image.
    """
    own = pipeline.scheduler
    if (shift := request.flow_shift) is not None:
        changes: dict[str, Any] = {"flow_shift" if "flow_shift" in own.config else "shift": shift}
        if own.config.use_dynamic_shifting:
            changes = {"base_shift": math.log(shift), "max_shift": math.log(shift), "shift_terminal": None}
        pipeline.scheduler = type(own).from_config({**own.config, **changes})
    yield
    pipeline.scheduler = own


class Drive:
    """A run of requests to their ends. Results by request id: `images`, `previews` (lists) and `errors`."""

    def __init__(
        self,
        runner: ModelRunner,
        place: Callable[[int, Mapping[str, int]], dict[str, list[int]]] | None = None,
        merge: Callable[[StepResult], StepResult] | None = None,
    ) -> None:
        """`place`: from the step's number and the guidance branches of its requests to the placement of the step.
        `merge`: from the result of one rank to that of all.
        """
        self.runner = runner
        self._place = place or (lambda step_id, branches: {})
        self._merge = merge or (lambda result: result)
        self.images: dict[str, np.ndarray] = {}
        self.previews: dict[str, list[np.ndarray]] = {}
        self.errors: dict[str, ItemError] = {}
        self.pack_sizes: list[int] = []

    def run(self, arrivals: Mapping[int, Sequence[DiffusionRequest]]) -> Drive:
        """`arrivals`: step -> requests that join in it. All active requests advance in every step."""
        steps: dict[str, int] = {}
        requests: dict[str, DiffusionRequest] = {}
        fresh: list[str] = []
        release: list[str] = []
        for step_id in itertools.count():
            new = list(arrivals.get(step_id, ()))
            requests |= {r.request_id: r for r in new}
            denoise = [i for i in steps if steps[i] < requests[i].num_inference_steps]
            plan = StepPlan(
                step_id,
                new_requests=new,
                encode=[r.request_id for r in new],
                denoise=denoise,
                decode=[i for i in steps if steps[i] == requests[i].num_inference_steps],
                placement=self._place(step_id, {i: 1 + requests[i].has_guidance for i in denoise}),
                preview=[i for i in denoise if steps[i] + 1 in getattr(requests[i], "preview_steps", ())],
                release=release,
            )
            result = self._merge(self.runner.execute(plan))
            self.images |= result.images
            self.errors |= result.errors
            self.pack_sizes.append(result.num_sequences)
            for request_id, preview in result.previews.items():
                self.previews.setdefault(request_id, []).append(preview)
            for request_id in result.advanced:
                steps[request_id] += 1
            fresh = plan.encode
            steps |= {i: 0 for i in fresh if i not in result.errors}
            release = [*result.images, *result.errors]
            for request_id in release:
                steps.pop(request_id, None)
            if not steps and not release and step_id >= max(arrivals):
                return self
        raise AssertionError("unreachable")


def kept(runner: ModelRunner) -> int:
    """Requests, states, layouts and static keys that the runner holds: private, but a leak shows nowhere else."""
    pipeline: Any = runner.pipeline
    num_static_keys = len(getattr(pipeline, "_static_keys", ()))
    return len(runner._requests) + len(runner.states) + len(pipeline._layouts) + num_static_keys


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in decibels; infinite when they are equal."""
    mse = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if mse == 0 else float(10 * np.log10(255.0**2 / mse))
