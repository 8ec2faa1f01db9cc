"""Trials of whole pipelines: failures, the reasons that are told, and the CPU threads."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.diffusion.compute.startup.test_thread_choice import Threads
from vllm_omni.diffusion.compute.coordination.ranks import Ranks
from vllm_omni.diffusion.compute.startup import whole_warmup
from vllm_omni.diffusion.compute.startup.rank_timer import RankTimer
from vllm_omni.diffusion.compute.startup.whole_warmup import warm_up_whole
from vllm_omni.errors import ConfigError


class TrialOf:
    """Trials of a fake whole pipeline. small, own: errors of small requests and of requests of its own size."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, small: Exception | None, own: Exception | None) -> None:
        self.errors = {"small": small, "own": own}
        self.made: list[str] = []
        self.device = Threads(8, {})
        monkeypatch.setattr(whole_warmup, "default_request", lambda info, tokens: "small" if tokens else "own")
        monkeypatch.setattr(whole_warmup, "_run", self._run)
        monkeypatch.setattr(whole_warmup, "_measure", lambda *given: [self._run(None, r, None) for r in given[-1]])

    def _run(self, pipeline: Any, request: Any, timer: Any) -> Any:
        self.made.append(request)
        if (error := self.errors[request]) is not None:
            raise error
        return (1.0, 1.0, 1.0)

    def start(self, bins: tuple[Any, ...] = (), num_threads: int | None = None) -> None:
        info: Any = SimpleNamespace(
            pipeline=SimpleNamespace(class_name="SomePipeline", bins=bins), count_prompt_tokens=len
        )
        device: Any = self.device
        warm_up_whole(SimpleNamespace(), info, RankTimer(device, Ranks()), 1, num_threads)  # type: ignore[arg-type]


@pytest.fixture
def twice_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each doubling of the threads halves the seconds of a step."""

    def mean(timer: RankTimer, run: Callable[[], object]) -> float:
        run()
        return 1 / timer.device.num_threads

    monkeypatch.setattr(RankTimer, "mean", mean)


@pytest.mark.parametrize("bins", [(), ("a bin",)])
def test_threads_are_chosen_again_after_a_small_trial_that_fails(
    monkeypatch: pytest.MonkeyPatch, twice_as_fast: None, bins: tuple[Any, ...]
) -> None:
    trial = TrialOf(monkeypatch, ValueError("too small"), None)
    trial.start(bins)
    assert trial.device.num_threads == 8
    assert trial.device.tried[-5:] == [1, 2, 4, 8, 8]
    assert trial.made.count("small") == (0 if bins else 1)


def test_given_threads_are_kept_in_both_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = TrialOf(monkeypatch, ValueError("too small"), None)
    trial.start(num_threads=3)
    assert trial.device.num_threads == 3
    assert trial.made[:2] == ["small", "own"]


@pytest.mark.parametrize(
    ("small", "own", "reasons", "num_trials"),
    [
        (
            ValueError("first\n  line"),
            KeyError("x"),
            "KeyError: 'x'; before that, on a small one: ValueError: first line",
            2,
        ),
        (ValueError("same"), ValueError("same"), "ValueError: same", 2),
        (
            torch.AcceleratorError("CUDA error: device-side assert"),
            None,
            "AcceleratorError: CUDA error: device-side assert",
            1,
        ),
        (RuntimeError("CUDA error: an illegal\naddress"), None, "RuntimeError: CUDA error: an illegal address", 1),
    ],
)
def test_a_failed_trial_gives_every_reason_and_stops_at_a_device_failure(
    monkeypatch: pytest.MonkeyPatch, small: Exception, own: Exception | None, reasons: str, num_trials: int
) -> None:
    trial = TrialOf(monkeypatch, small, own)
    with pytest.raises(ConfigError) as caught:
        trial.start(num_threads=1)
    assert str(caught.value) == f"the SomePipeline fails on a default request: {reasons}"
    assert len(trial.made) == num_trials


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("CUDA error: out of memory")]
)
def test_a_trial_without_memory_raises_the_memory_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    trial = TrialOf(monkeypatch, error, None)
    with pytest.raises(type(error)) as caught:
        trial.start(num_threads=1)
    assert caught.value is error
    assert trial.made == ["small"]
