"""Recorded steps draw what steps sent block by block draw: a recorder as a GPU has one, on the CPU."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.diffusion.distributed.ranks import run_places
from tests.diffusion.worker.driving import Drive, make_request
from tests.diffusion.worker.replica import merging, started
from tests.tiny_models import SMALL, build_tiny_qwen_image
from tests.tiny_z_image import build_tiny_z_image
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.models import recorded
from vllm_omni.diffusion.packing import Hidden
from vllm_omni.diffusion.registry import load_model_info
from vllm_omni.diffusion.worker.contract import Place
from vllm_omni.diffusion.worker.device import Device
from vllm_omni.diffusion.worker.ranks import Ranks
from vllm_omni.diffusion.worker.runner import ModelRunner
from vllm_omni.errors import ConfigError

BUILDERS = {"qwen_image": build_tiny_qwen_image, "z_image": build_tiny_z_image}
ARRIVALS = {
    0: [make_request("a", negative_prompt="", num_inference_steps=9, seed=1)],
    2: [make_request("b", "a blue car", height=48, width=80, num_inference_steps=8, true_cfg_scale=1.0, seed=2)],
    7: [make_request("c", "apple " * 20, height=96, negative_prompt=" ", num_inference_steps=5, seed=3)],
}


class Recorder:
    """What is recorded is computed from what the inputs hold when it is played again, into the same results."""

    def __init__(self, error: Exception | None = None) -> None:
        self.num_records = self.num_replays = 0
        self._error = error

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        if self._error is not None:
            raise self._error
        self.num_records += 1
        output: Hidden = run()
        for tensor in (output.text, output.image):
            tensor.fill_(torch.nan)

        def replay() -> None:
            self.num_replays += 1
            again: Hidden = run()
            output.text.copy_(again.text)
            output.image.copy_(again.image)

        return output, replay


def draw(path: Path, recorder: Recorder | None, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Drive:
    monkeypatch.setattr(Device, "recorder", lambda self: recorder)
    records = recorder is not None
    runner = ModelRunner(OmniDiffusionConfig(str(path), cuda_graphs=records, **settings), load_model_info(str(path)))
    runner.start()
    if recorder is not None:
        recorder.num_records = recorder.num_replays = 0
    drive = Drive(runner).run(ARRIVALS)
    assert not drive.errors
    return drive


def assert_equal(got: Drive, wanted: Drive) -> None:
    assert got.images.keys() == wanted.images.keys() == {"a", "b", "c"}
    for request_id, picture in wanted.images.items():
        assert np.array_equal(got.images[request_id], picture)


@pytest.mark.parametrize("family", BUILDERS)
def test_memberships_are_recorded_at_their_third_step(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, recorder = BUILDERS[family](tmp_path / "model"), Recorder()
    recorded_drive = draw(path, recorder, monkeypatch)
    assert_equal(recorded_drive, draw(path, None, monkeypatch))
    # a alone has 2 steps; with b 5; all three 2, while a ends with step 8; then b and c 1; c alone 2.
    assert recorder.num_records == 1
    assert recorder.num_replays == 3


def test_a_step_cache_is_served_block_by_block(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "cache_backend": "cache_dit",
        "cache_config": {"max_warmup_steps": 2, "residual_diff_threshold": 1000.0},
    }
    cached, recorder = draw(tiny_model, None, monkeypatch, **settings), Recorder()
    assert_equal(draw(tiny_model, recorder, monkeypatch, **settings), cached)


def test_large_steps_are_not_recorded(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(recorded, "MAX_TOKENS", 10)
    draw(tiny_model, recorder, monkeypatch)
    assert recorder.num_records == 0


def test_steps_for_whose_recording_memory_is_missing_are_sent(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    drawn = draw(tiny_model, Recorder(torch.OutOfMemoryError("no room")), monkeypatch)
    assert "no memory to record a step of" in caplog.text
    assert_equal(drawn, draw(tiny_model, None, monkeypatch))


def test_what_cannot_be_recorded_ends_the_start(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="recorded as a CUDA graph: not permitted; without --cuda-graphs"):
        draw(tiny_model, Recorder(RuntimeError("not permitted")), monkeypatch)


def test_a_cpu_takes_no_cuda_graphs(tiny_model: Path) -> None:
    runner = ModelRunner(
        OmniDiffusionConfig(str(tiny_model), cuda_graphs=True, device="cpu"), load_model_info(str(tiny_model))
    )
    with pytest.raises(ConfigError, match="--cuda-graphs takes a GPU, got cpu"):
        runner.start()


def draw_shared(place: Place, parallel: DiffusionParallelConfig, path: Path, records: bool) -> Any:
    runner, recorder = started(place, parallel, path), Recorder()
    runner.pipeline.recorder = recorder if records else None
    drive = Drive(runner, merge=merging(runner)).run(ARRIVALS)
    assert not drive.errors
    return drive.images, recorder.num_replays


@pytest.mark.parametrize("layout", [{"ulysses_degree": 2}, {"tensor_parallel_size": 2}], ids=str)
def test_ranks_that_share_sequences_record_the_same_steps(tmp_path: Path, layout: dict[str, int]) -> None:
    path = build_tiny_qwen_image(tmp_path / "model", heads=4, default_sampling_params=SMALL)
    parallel = DiffusionParallelConfig(**layout)
    plain, shared = (run_places(draw_shared, parallel, parallel, path, records) for records in (False, True))
    assert [replays for _, replays in shared] == [3, 3]
    for (got, _), (wanted, _) in zip(shared, plain, strict=True):
        assert got.keys() == wanted.keys()
        for request_id, picture in wanted.items():
            assert np.array_equal(got[request_id], picture)


def test_replays_count_what_they_hand_to_exchanges() -> None:
    sent = Counter({"all_reduce": 5})

    class Silent:
        def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
            return run(), lambda: None

    world: Any = SimpleNamespace(mesh=None, sent=sent)
    _, replay = Ranks(world).counting(Silent()).record(lambda: sent.update(all_reduce=3, p2p=2))
    assert +sent == Counter({"all_reduce": 5})
    sent.clear()
    for count in (1, 2):
        replay()
        assert sent == Counter({"all_reduce": 3 * count, "p2p": 2 * count})


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
    recordings, recorder = recorded.Recordings(), Recorder()
    for step in range(10):
        hidden, blocks = Hidden(torch.randn(2, 3), torch.randn(4, 3)), Summing(torch.randn(1, 1, 1 + step % 2, 1, 3))
        got, wanted = recordings.run(hidden, blocks, recorder), blocks.run(hidden, range(1))
        assert torch.equal(got.text, wanted.text)
        assert torch.equal(got.image, wanted.image)
    assert (recorder.num_records, recorder.num_replays) == (2, 6)
