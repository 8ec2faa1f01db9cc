"""Drive a ModelRunner with a step cache and see which steps it skips."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from testbed.runner_driver import QUICK, Drive
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest

Skips = dict[str, list[list[int]]]
"""Request -> for each guidance branch, the steps that were skipped."""


def started(path: Path, backend: str, config: Mapping[str, Any] | None = None) -> ModelRunner:
    """A runner with a step cache, after the shortest warm-up."""
    settings = OmniDiffusionConfig(model=str(path), cache_backend=backend, cache_config=config or {})
    runner = ModelRunner(settings, load_model_info(str(path)), options=QUICK)
    runner.start()
    return runner


def watch_skips(runner: ModelRunner) -> Skips:
    """Skipped steps of the branches that this rank computes; filled while the runner works."""
    skips: Skips = defaultdict(list)
    pipeline = runner.pipeline
    advance = pipeline.advance

    def watched(state: Any, *rest: Any) -> Any:
        branches = skips[state.request.request_id]
        branches += [[] for _ in range(len(state.cache_slots) - len(branches))]
        for branch, slot in zip(branches, state.cache_slots):
            if slot is not None and slot.skipped:
                branch.append(state.step)
        return advance(state, *rest)

    pipeline.advance = watched  # type: ignore[method-assign,assignment]
    return skips


def draw(
    path: Path, backend: str, config: Mapping[str, Any], arrivals: Mapping[int, Sequence[DiffusionRequest]]
) -> tuple[Drive, Skips]:
    """Pictures and skipped steps of requests, which arrive at the given steps."""
    runner = started(path, backend, config)
    skips = watch_skips(runner)
    drive = Drive(runner).run(arrivals)
    assert drive.errors == {}
    return drive, dict(skips)
