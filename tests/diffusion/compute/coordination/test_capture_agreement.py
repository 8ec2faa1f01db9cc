"""Ranks that capture steps with exchanges make the pictures of one process; a fake capturer replays on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from testbed.runner_driver import Drive, make_request, psnr
from testbed.tiny_models import build_tiny_qwen_image
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.families.test_cuda_graphs import ARRIVALS, Capturer
from tests.diffusion.compute.worker.replica import merging, started
from tests.diffusion.compute.worker.test_layouts import placed_in_turn
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.plan import StepResult
from vllm_omni.diffusion.messages.worker import RankInfo

LAYOUTS: dict[str, dict[str, int]] = {
    "ulysses 2": {"ulysses_degree": 2},
    "ring 2": {"ring_degree": 2},
    "tensor 2": {"tensor_parallel_size": 2},
    "cfg 2 x ulysses 2": {"cfg_parallel_size": 2, "ulysses_degree": 2},
}


class SilentCapturer(Capturer):
    """A fake capturer whose replays do not count the bytes that they send."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.late_error: Exception | None = None
        """Raised behind the exchanges, which the other ranks' recorders do meanwhile."""

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        output, replay = super().capture(run)
        if self.late_error is not None:
            raise self.late_error

        def silently() -> None:
            before = Counter(self.sent)
            replay()
            self.sent.clear()
            self.sent.update(before)

        return output, silently


def draw(
    rank_info: RankInfo,
    parallel: DiffusionParallelConfig,
    path: Path,
    capturer: SilentCapturer | None,
    error: Exception | None,
) -> tuple[dict[str, np.ndarray], dict[str, int], int, bool]:
    """Pictures, bytes sent, replays, and a failure flag. error: raised by rank 0's capturer after the start."""
    Device.capturer = lambda self: capturer  # type: ignore[assignment,method-assign,return-value]  # in a process of its own
    runner = started(rank_info, parallel, path)
    runner.ranks.take_sent_bytes()
    if capturer is not None:
        assert runner.ranks.world is not None
        capturer.sent = runner.ranks.world.sent
        capturer.num_replays = 0
        capturer.late_error = error if rank_info.rank == 0 else None
    sent: dict[str, int] = {}
    merge = merging(runner)

    def count(result: StepResult) -> StepResult:
        for kind, num_bytes in result.sent_bytes.items():
            sent[kind] = sent.get(kind, 0) + num_bytes
        return merge(result)

    drive = Drive(runner, partial(placed_in_turn, parallel.cfg_parallel_size), count).run(ARRIVALS)
    assert drive.errors == {}
    pipeline: Any = runner.pipeline
    has_failed = capturer is not None and pipeline.capturer is not None and pipeline.capturer.failure is not None
    return drive.images, sent, 0 if capturer is None else capturer.num_replays, has_failed


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen_image(tmp_path_factory.mktemp("model") / "model", heads=4)


@pytest.fixture(scope="module")
def one(path: Path) -> dict[str, np.ndarray]:
    ((pictures, *_),) = run_places(draw, DiffusionParallelConfig(), DiffusionParallelConfig(), path, None, None)
    assert isinstance(pictures, dict)
    return pictures


def on_ranks(path: Path, layout: str, capturer: SilentCapturer | None, error: Exception | None = None) -> list[Any]:
    parallel = DiffusionParallelConfig(**LAYOUTS[layout])
    return run_places(draw, parallel, parallel, path, capturer, error)


def check(drawn: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert drawn.keys() == wanted.keys()
    assert min(psnr(drawn[request_id], wanted[request_id]) for request_id in wanted) >= 60


@pytest.mark.parametrize(
    "layout",
    [
        "ring 2",
        pytest.param("cfg 2 x ulysses 2", marks=pytest.mark.thorough),
        *(pytest.param(n, marks=pytest.mark.layouts) for n in LAYOUTS if n not in ("ring 2", "cfg 2 x ulysses 2")),
    ],
)
def test_captured_exchanges_give_the_same_pictures_and_byte_counts(
    path: Path, one: dict[str, np.ndarray], layout: str
) -> None:
    sent_as_they_are = on_ranks(path, layout, None)
    for (pictures, sent, num_replays, has_failed), (_, wanted_sent, *_) in zip(
        on_ranks(path, layout, SilentCapturer()), sent_as_they_are, strict=True
    ):
        check(pictures, one)
        assert num_replays >= 4
        assert not has_failed
        assert 0 <= sent.pop("all_reduce", 0) - wanted_sent.pop("all_reduce", 0) <= 100  # whether all have recorded
        assert sent == wanted_sent


@pytest.mark.parametrize(
    ("error", "fails"), [(torch.OutOfMemoryError("no room"), False), (RuntimeError("not permitted"), True)]
)
def test_a_failed_capture_on_one_rank_is_used_by_no_rank(
    path: Path, one: dict[str, np.ndarray], error: Exception, fails: bool
) -> None:
    for pictures, _, num_replays, has_failed in on_ranks(path, "ulysses 2", SilentCapturer(), error):
        check(pictures, one)
        assert num_replays == 0
        assert has_failed == fails


def draw_with_a_failed_decode(
    rank_info: RankInfo, parallel: DiffusionParallelConfig, path: Path, capturer: SilentCapturer
) -> tuple[list[str], list[str], int]:
    """Errors, pictures, and how often captured graphs were dropped; the decode of "early" fails on rank 0."""
    Device.capturer = lambda self: capturer  # type: ignore[assignment,method-assign,return-value]  # in a process of its own
    runner = started(rank_info, parallel, path)
    assert runner.ranks.world is not None
    capturer.sent = runner.ranks.world.sent
    decode = runner.pipeline.decode

    def failing(requests: Any, latents: Any) -> Any:
        if requests and requests[0].request_id == "early" and rank_info.rank == 0:
            raise torch.OutOfMemoryError("no room")
        return decode(requests, latents)

    runner.pipeline.decode = failing  # type: ignore[method-assign]
    late = make_request("late", num_inference_steps=14, true_cfg_scale=1.0)  # alone in a membership known by then
    early = make_request("early", negative_prompt="", num_inference_steps=3)
    drive = Drive(runner, merge=merging(runner)).run({0: [late], 4: [early]})
    return list(drive.errors), list(drive.images), capturer.num_releases


def test_a_lack_of_memory_on_one_rank_drops_the_captured_graphs_of_all(path: Path) -> None:
    parallel = DiffusionParallelConfig(**LAYOUTS["ulysses 2"])
    for outcome in run_places(draw_with_a_failed_decode, parallel, parallel, path, SilentCapturer()):
        assert outcome == (["early"], ["late"], 1)
