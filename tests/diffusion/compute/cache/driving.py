"""Drive a ModelRunner with a step cache and see which steps it skips."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.diffusion.compute.worker.driving import QUICK, Drive
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest

Skips = dict[str, list[list[int]]]
"""By request, by guidance branch: the steps that were skipped."""


def started(path: Path, backend: str, config: Mapping[str, Any] | None = None) -> ModelRunner:
    """A runner after the shortest warm-up."""
    settings = OmniDiffusionConfig(model=str(path), cache_backend=backend, cache_config=config or {})  # type: ignore[arg-type]  # checked
    runner = ModelRunner(settings, load_model_info(str(path)), options=QUICK)
    runner.start()
    return runner


def watch_skips(runner: ModelRunner) -> Skips:
    """Filled while the runner works, with what this rank computes."""
    skips: Skips = defaultdict(list)
    pipeline = runner.pipeline
    advance = pipeline.advance

    def watched(state: Any, velocity: Any) -> None:
        branches = skips[state.request.request_id]
        branches += [[] for _ in range(len(state.cache_slots) - len(branches))]
        for branch, slot in zip(branches, state.cache_slots):
            if slot is not None and slot.skipped:
                branch.append(state.step)
        advance(state, velocity)

    pipeline.advance = watched  # type: ignore[method-assign]
    return skips


def draw(
    path: Path, backend: str, config: Mapping[str, Any], arrivals: Mapping[int, Sequence[DiffusionRequest]]
) -> tuple[Drive, Skips]:
    runner = started(path, backend, config)
    skips = watch_skips(runner)
    drive = Drive(runner).run(arrivals)
    assert drive.errors == {}
    return drive, dict(skips)
