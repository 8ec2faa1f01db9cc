"""Random requests with aborts, errors and lack of memory in the middle of turns: nothing stays behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from testbed.fakes import make_config, make_ready
from testbed.runner_driver import QUICK, kept, make_request
from tests.diffusion.compute.offload.strict_turns import turns_of, use_strict_turns
from tests.diffusion.compute.worker.scheduled_replica import Replica
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.control.scheduler import Scheduler
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_REQUESTS = 300


def fails_at_random(dice: random.Random, run: Callable[..., Any], share: float) -> Callable[..., Any]:
    def sometimes(*arguments: Any) -> Any:
        made = run(*arguments)  # the fault comes in the middle of a turn, not before it
        if dice.random() < share:
            raise RuntimeError("a fault")
        return made

    return sometimes


def test_bytes_return_to_those_of_the_start(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_strict_turns(monkeypatch)
    config = OmniDiffusionConfig(model=str(tiny_model), enable_cpu_offload=True)
    options = replace(QUICK, turns_bytes=1)
    runner = ModelRunner(config, load_model_info(str(tiny_model)), options=options)
    runner.start()
    pipeline: Any = runner.pipeline
    turns, dice = turns_of(runner), random.Random(0)
    memory = turns.memory
    turns.release_memory()
    assert memory.num_bytes == 0
    monkeypatch.setattr(pipeline, "_forward", fails_at_random(dice, pipeline._forward, 0.03))
    monkeypatch.setattr(pipeline._prompts, "_encode", fails_at_random(dice, pipeline._prompts._encode, 0.05))
    monkeypatch.setattr(pipeline, "_decode", fails_at_random(dice, pipeline._decode, 0.03))
    replica = Replica(runner, DiffusionParallelConfig())
    ready = make_ready(max_batch_tokens=400, seconds_per_unit=1e-3, encode_turn_seconds=0.02, decode_turn_seconds=0.01)
    replica.scheduler = Scheduler(make_config(max_num_queued_reqs=NUM_REQUESTS), ready)
    left = NUM_REQUESTS
    aborted: set[str] = set()
    while replica.step() or left:
        for _ in range(min(left, dice.randint(0, 6))):
            left -= 1
            fields = {"height": 16, "width": 16, "num_inference_steps": dice.randint(1, 2)}
            request = make_request(f"r{left}", f"{left} apples", **fields)
            replica.add([request])
        if dice.random() < 0.1 and (running := [*replica.scheduler._begun]):
            aborted.add(victim := dice.choice(running))
            runner.abort([victim])
            replica.scheduler.abort([victim])
        if dice.random() < 0.05:
            memory.fails_after = memory.num_taken
    ends = replica.images.keys() | replica.errors.keys() | aborted
    assert len(ends) == NUM_REQUESTS
    assert len(replica.images) > NUM_REQUESTS // 2
    assert {error.kind for error in replica.errors.values()} >= {"internal"}
    assert kept(runner) == 0
    residency = turns.residency
    assert memory.places == {name: residency.sizes[name] for name in residency.present}
    assert memory.peak_bytes == residency.peak_bytes
    turns.release_memory()
    assert memory.places == {}
