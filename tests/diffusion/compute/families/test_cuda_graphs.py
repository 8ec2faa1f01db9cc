"""Captured steps draw what steps sent block by block draw: a capturer as a GPU has one, on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from testbed.runner_driver import QUICK, Drive, make_request
from testbed.tiny_models import build_tiny_qwen_image
from testbed.tiny_wan import build_tiny_wan
from testbed.tiny_z_image import build_tiny_z_image
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.packing import Hidden
from vllm_omni.diffusion.compute.step.cuda_graphs import MAX_TOKENS, CapturedGraphs, captured
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import ConfigError

BUILDERS: dict[str, Callable[..., Path]] = {
    "qwen_image": build_tiny_qwen_image,
    "z_image": build_tiny_z_image,
    "wan": partial(build_tiny_wan, default_sampling_params={"height": 64, "width": 64, "num_frames": 1}),
}
ARRIVALS = {
    0: [make_request("a", negative_prompt="", num_inference_steps=9, seed=1)],
    2: [make_request("b", "a blue car", height=48, width=80, num_inference_steps=8, true_cfg_scale=1.0, seed=2)],
    7: [make_request("c", "apple " * 20, height=96, negative_prompt=" ", num_inference_steps=5, seed=3)],
}


class Capturer:
    """A replay computes from the inputs' values at that time, into the same result tensors.

    Captured graphs share their memory: what others have made is gone after that.
    """

    def __init__(self, error: Exception | None = None) -> None:
        self.num_captures = self.num_replays = self.num_releases = 0
        self.error = error
        self.failure: str | None = None
        self._outputs: list[Hidden] = []

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        if self.error is not None:
            raise self.error
        self.num_captures += 1
        output: Hidden = run()
        self._outputs.append(output)
        self._spoil_outputs()

        def replay() -> None:
            self.num_replays += 1
            self._spoil_outputs()
            again: Hidden = run()
            output.text.copy_(again.text)
            output.image.copy_(again.image)

        return output, replay

    def _spoil_outputs(self) -> None:
        for output in self._outputs:
            output.text.fill_(torch.nan)
            output.image.fill_(torch.nan)

    def release(self) -> None:
        self.num_releases += 1


def draw(path: Path, capturer: Capturer | None, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Drive:
    monkeypatch.setattr(Device, "capturer", lambda self: capturer)
    runner = ModelRunner(OmniDiffusionConfig(str(path), **settings), load_model_info(str(path)), options=QUICK)
    runner.start()
    if capturer is not None:
        capturer.num_captures = capturer.num_replays = 0
    drive = Drive(runner).run(ARRIVALS)
    assert not drive.errors
    return drive


def assert_equal(got: Drive, wanted: Drive) -> None:
    assert got.images.keys() == wanted.images.keys() == {"a", "b", "c"}
    for request_id, picture in wanted.images.items():
        assert np.array_equal(got.images[request_id], picture)


@pytest.mark.parametrize("family", BUILDERS)
def test_memberships_are_recorded_at_their_second_step(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, capturer = BUILDERS[family](tmp_path / "model"), Capturer()
    recorded_drive = draw(path, capturer, monkeypatch)
    assert_equal(recorded_drive, draw(path, None, monkeypatch))
    # a alone has 2 steps; with b 5; all three 2, while a ends with step 8; then b and c 1; c alone 2.
    assert capturer.num_captures == 4
    assert capturer.num_replays == 1 + 4 + 1 + 1


@pytest.mark.thorough
@pytest.mark.parametrize("refining", [0, 1])
def test_blocks_that_a_step_cache_runs_by_themselves_are_recorded_so(
    tmp_path: Path, refining: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_tiny_qwen_image(tmp_path / "model", layers=4, time_scale=0.1)
    settings: dict[str, Any] = {
        "cache_backend": "cache_dit",
        "cache_config": {"max_warmup_steps": 3, "residual_diff_threshold": 0.1, "Bn_compute_blocks": refining},
    }
    cached, capturer = draw(path, None, monkeypatch, **settings), Capturer()
    assert_equal(draw(path, capturer, monkeypatch, **settings), cached)
    assert capturer.num_captures >= 3  # the first block and others


def test_large_steps_are_not_captured() -> None:
    small, large = (Mock(pack=Mock(most_tokens=MAX_TOKENS + more)) for more in (0, 1))
    assert captured(small, CapturedGraphs(), Capturer()) is not small
    assert captured(large, CapturedGraphs(), Capturer()) is large


def test_steps_for_whose_recording_memory_is_missing_are_sent(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    drawn = draw(tiny_model, Capturer(torch.OutOfMemoryError("no room")), monkeypatch)
    assert "no memory to capture a step of" in caplog.text
    assert_equal(drawn, draw(tiny_model, None, monkeypatch))


def test_what_cannot_be_recorded_ends_the_start(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="CUDA graphs here: not permitted; --enforce-eager serves without"):
        draw(tiny_model, Capturer(RuntimeError("not permitted")), monkeypatch)


def test_what_cannot_be_recorded_later_is_sent_and_nothing_is_recorded_any_more(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    capturer = Capturer()
    monkeypatch.setattr(Device, "capturer", lambda self: capturer)
    runner = ModelRunner(OmniDiffusionConfig(str(tiny_model)), load_model_info(str(tiny_model)), options=QUICK)
    runner.start()
    capturer.error = RuntimeError("not permitted")
    for _ in range(2):
        drive = Drive(runner).run(ARRIVALS)
        assert not drive.errors
    assert sum("cannot be captured: not permitted" in r.getMessage() for r in caplog.records) == 1
    assert_equal(drive, draw(tiny_model, None, monkeypatch))


def test_a_step_that_runs_out_of_memory_drops_all_recordings(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capturer = Capturer()
    monkeypatch.setattr(Device, "capturer", lambda self: capturer)
    runner = ModelRunner(OmniDiffusionConfig(str(tiny_model)), load_model_info(str(tiny_model)), options=QUICK)
    runner.start()
    capturer.num_captures = 0
    pipeline: Any = runner.pipeline
    predict, num_in_company, held = pipeline.predict, [0], []

    def short_of_memory(states: Any, groups: Any) -> Any:
        num_in_company[0] += len(states) > 1
        if len(states) > 1 and num_in_company[0] == 3:
            held.append((capturer.num_captures, len(pipeline._layouts)))
            raise torch.OutOfMemoryError("no room")
        if held and len(states) == 1 and len(held) == 1:
            held.append((capturer.num_releases, len(pipeline._layouts)))
        return predict(states, groups)

    monkeypatch.setattr(pipeline, "predict", short_of_memory)
    drive = Drive(runner).run(ARRIVALS)
    assert not drive.errors
    assert held == [(2, 2), (1, 0)]  # those of a alone and with b; then none
    assert_equal(drive, draw(tiny_model, None, monkeypatch))


def test_neither_a_cpu_nor_who_enforces_eager_records(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def capturer_of(**settings: Any) -> Any:
        runner = ModelRunner(
            OmniDiffusionConfig(str(tiny_model), **settings), load_model_info(str(tiny_model)), options=QUICK
        )
        runner.start()
        pipeline: Any = runner.pipeline
        return pipeline.capturer

    assert capturer_of() is None
    monkeypatch.setattr(Device, "capturer", lambda self: Capturer())
    assert capturer_of() is not None
    assert capturer_of(enforce_eager=True) is None


class Summing:
    """One block, which adds to every token what text and modulation add up to."""

    num_blocks = 1
    pack: Any = None

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def with_rows(self, rows: torch.Tensor) -> Summing:
        return Summing(rows)

    def run(self, hidden: Hidden, which: range) -> Hidden:
        total = hidden.text.sum() + self.rows.sum()
        return Hidden(hidden.text + total, hidden.image + total)

    def signal(self, hidden: Hidden) -> torch.Tensor:
        return hidden.image

    def select(self, members: Any) -> Summing:
        return self


def test_a_replay_reads_all_that_may_change() -> None:
    captured_graphs, capturer = CapturedGraphs(), Capturer()
    for step in range(10):
        hidden, blocks = Hidden(torch.randn(2, 3), torch.randn(4, 3)), Summing(torch.randn(1, 1, 1 + step % 2, 1, 3))
        got, wanted = captured_graphs.run(hidden, blocks, range(1), capturer), blocks.run(hidden, range(1))
        assert torch.equal(got.text, wanted.text)
        assert torch.equal(got.image, wanted.image)
    assert (capturer.num_captures, capturer.num_replays) == (2, 8)
