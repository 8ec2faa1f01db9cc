"""A replica of gloo ranks, each with a whole ModelRunner; for functions that `run_places` runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from testbed.runner_driver import QUICK
from vllm_omni.diffusion.catalog.registry import PIPELINES, load_model_info
from vllm_omni.diffusion.compute.startup.model_start import pipeline_class
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.control.executor.merging import merge_results
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import StepResult
from vllm_omni.diffusion.messages.worker import RankInfo

# Ranks are forks: what this process has not imported, each of them would import again.
for _family in PIPELINES:
    pipeline_class(_family)


def started(rank_info: RankInfo, parallel: DiffusionParallelConfig, path: Path, **settings: Any) -> ModelRunner:
    """A runner after the shortest warm-up, in a process of its own."""
    config = OmniDiffusionConfig(model=str(path), parallel=parallel, **settings)
    runner = ModelRunner(config, load_model_info(str(path)), rank_info, QUICK)
    runner.start()
    return runner


def merging(runner: ModelRunner) -> Callable[[StepResult], StepResult]:
    """A merge of the results of all ranks, like the executor's, on every rank."""
    group = runner.ranks.mesh.control

    def merge(result: StepResult) -> StepResult:
        if group.size == 1:
            return result
        results: list[StepResult | None] = [None] * group.size
        dist.all_gather_object(results, result, group=group.process_group)
        found = [r for r in results if r is not None]
        made = [
            request_id for r in found for request_id in [*r.images, *r.frames, *(f"{i}/preview" for i in r.previews)]
        ]
        assert len(made) == len(set(made)), "each picture is decoded once"
        return merge_results(found)

    return merge
