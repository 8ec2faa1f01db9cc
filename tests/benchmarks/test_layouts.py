"""Sections `layouts` and `load` with engines whose times are known: what is made of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import load
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.load import contenders

from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.errors import GenerationError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt
from vllm_omni.outputs import OmniRequestOutput

NUM_SKIPPED = 9
"""Steps that the forced pattern skips out of 16."""
STEP, SKIPPING_STEP = 0.5, 0.125
"""Seconds on one device."""


class KnownOmni:
    """A step takes STEP, and a second more with a long text, shared by the devices; pictures differ by a level."""

    def __init__(self, size: int) -> None:
        self._size = size

    def generate(self, prompt: OmniPrompt, params: OmniDiffusionSamplingParams) -> list[OmniRequestOutput]:
        assert params.num_inference_steps
        skipped = NUM_SKIPPED if params.cache else 0
        step = STEP + (1.0 if len(prompt.prompt) > 100 else 0.0)
        seconds = step * (params.num_inference_steps - skipped) + SKIPPING_STEP * skipped
        picture = np.full((64, 64, 3), 100 + (self._size > 1), np.uint8)
        timings = {"denoise": seconds / self._size, "cached_steps": skipped}
        return [OmniRequestOutput("r", prompt.prompt, images=[picture], timings=timings)]

    def close(self) -> None:
        pass


def measure(tmp_path: Path, sections: str, *more: str) -> dict[str, Any]:
    """Rows by case."""
    file = tmp_path / "gpu.json"
    arguments = ["--tiny", "--sections", sections, "--out", str(file), "--models", str(tmp_path / "models"), *more]
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    assert ended.value.code == 0
    return {row["case"]: row for rows in json.loads(file.read_text())["cases"].values() for row in rows}


def test_layouts_are_held_to_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def omni(bench: Bench, name: str, parallel_config: DiffusionParallelConfig, **settings: Any) -> KnownOmni:
        assert settings["cache_backend"] == "cache_dit"
        return KnownOmni(parallel_config.world_size)

    monkeypatch.setattr(Bench, "omni", omni)
    rows = measure(tmp_path, "layouts", "--layouts", "ulysses=2,cfg=2")
    one, four = rows["one device, 64x64"], rows["ulysses 2 x cfg 2, 64x64"]
    assert (one["measured"], four["measured"]) == (1e3 * STEP, 1e3 * STEP / 4)
    assert "speed-up" not in one["detail"]
    assert four["detail"]["speed-up"] == pytest.approx(4)
    assert four["detail"]["efficiency"] == pytest.approx(1)
    assert four["detail"]["dB to one device"] == pytest.approx(20 * np.log10(255))

    cached = rows["ulysses 2 x cfg 2, 64x64, 16 steps, cached"]
    one_cached = 7 * STEP + NUM_SKIPPED * SKIPPING_STEP
    assert cached["measured"] == pytest.approx(1e3 * one_cached / 4)
    assert cached["detail"]["a skipping step ms"] == pytest.approx(1e3 * SKIPPING_STEP / 4)
    assert cached["detail"]["speed-up over one device uncached"] == pytest.approx(4 * 16 * STEP / one_cached)
    assert cached["detail"]["speed-up over one device cached"] == pytest.approx(4)
    assert cached["detail"]["efficiency over one device cached"] == pytest.approx(1)

    long = rows["ulysses 2 x cfg 2, 64x64, long prompts"]["detail"]
    assert 450 < long["text tokens of each branch"] <= 500
    assert long["of it for the longer text, ms"] == pytest.approx(1e3 / 4)


class KnownAsyncOmni:
    """Answers at once; every second request fails where there is one copy."""

    def __init__(self, parallel_config: DiffusionParallelConfig, **settings: Any) -> None:
        self._fails = parallel_config.data_parallel_size == 1
        self.prompts: list[str] = []

    async def start(self) -> None:
        pass

    async def generate(
        self, prompt: OmniPrompt, params: OmniDiffusionSamplingParams
    ) -> AsyncIterator[OmniRequestOutput]:
        self.prompts.append(prompt.prompt)
        if self._fails and len(self.prompts) % 2:
            raise GenerationError("no room")
        yield OmniRequestOutput("r", prompt.prompt, timings={"denoise": 0.25, "total": 0.5}, finished=True)

    async def close(self) -> None:
        pass


def test_load_is_latencies_at_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "AsyncOmni", KnownAsyncOmni)
    rows = measure(tmp_path, "load", "--layouts", "cfg=2")
    for rate in (5, 10, 15):
        copies, shared = (rows[f"{name}, {rate} a second"] for name in ("data 2", "cfg 2"))
        assert copies["detail"]["requests"] == load.MIN_REQUESTS
        assert copies["detail"]["denoise ms"] == 250
        assert 0 < copies["measured"] <= copies["detail"]["p90 ms"]
        assert shared["refused"] == "failed: 3 of 6 requests"


def test_contenders_take_all_devices() -> None:
    assert [DiffusionParallelConfig(**degrees).world_size for degrees in contenders(2)] == [2, 2]
    assert contenders(4) == ({"data_parallel_size": 4}, {"cfg_parallel_size": 2, "ulysses_degree": 2})
