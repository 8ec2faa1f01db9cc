"""Rates from made-up measurements, and a warm-up that ends on slow and on small devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_omni.diffusion.compute.coordination.ranks import RanksLostError
from vllm_omni.diffusion.compute.startup import warmup
from vllm_omni.diffusion.compute.startup.warmup import Sample, Timer, choose_num_threads, fit_line, knee, measure_steps
from vllm_omni.errors import ConfigError


def samples(seconds_of: dict[int, float]) -> list[Sample]:
    return [Sample(tokens=t, units=2.0 * t, seconds=s) for t, s in seconds_of.items()]


def test_a_line_is_found() -> None:
    slope, overhead = fit_line(samples({t: 0.01 + 0.001 * t for t in (16, 32, 64, 128)}))
    assert slope == pytest.approx(0.0005)
    assert overhead == pytest.approx(0.01)


def test_one_sample_is_all_work_and_no_overhead() -> None:
    assert fit_line(samples({50: 3.0})) == (0.03, 0.0)


def test_a_noisy_measurement_gives_no_negative_rates() -> None:
    slope, overhead = fit_line(samples({16: 0.1, 32: 0.09, 64: 0.08}))
    assert slope > 0
    assert overhead == 0
    slope, overhead = fit_line(samples({16: 0.01, 32: 0.1, 64: 0.3}))
    assert slope > 0
    assert overhead == 0


def test_the_knee_is_where_more_tokens_gain_little() -> None:
    # Time per unit: 1, 0.6, 0.5, 0.45, 0.44.
    assert knee(samples({16: 32, 32: 38.4, 64: 64, 128: 115.2, 256: 225.28})) == 64
    assert knee(samples({50: 3.0})) == 50


class Threads:
    """A device with some threads; a step takes the seconds of the number in use."""

    def __init__(self, num_threads: int, seconds: dict[int, float]) -> None:
        self.num_threads = num_threads
        self.seconds = seconds
        self.tried: list[int] = []

    def set_num_threads(self, count: int) -> None:
        self.num_threads = count
        self.tried.append(count)


@pytest.mark.parametrize(
    ("most", "seconds", "chosen"),
    [
        (8, {1: 8.0, 2: 4.0, 4: 2.0, 8: 1.0}, 8),
        (8, {1: 8.0, 2: 4.0, 4: 3.9, 8: 0.1}, 2),
        (2, {1: 0.013, 2: 0.6}, 1),
        (6, {1: 4.0, 2: 2.0, 4: 1.0}, 4),
        (1, {1: 1.0}, 1),
    ],
)
def test_threads_are_taken_while_they_help(most: int, seconds: dict[int, float], chosen: int) -> None:
    device = Threads(most, seconds)

    class FakeTimer:
        def mean(self, run: Callable[[], object]) -> float:
            return device.seconds[device.num_threads]

    choose_num_threads(device, FakeTimer(), lambda: None)  # type: ignore[arg-type]
    assert device.num_threads == chosen


class TrialOf:
    """Trials of a whole pipeline of 64x64, whose small requests and those of its own size raise these errors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, small: Exception | None, own: Exception | None) -> None:
        self.errors = {"small": small, "own": own}
        self.made: list[str] = []
        self.device = Threads(8, {})
        monkeypatch.setattr(warmup, "_whole_request", lambda info, tokens: "small" if tokens else "own")
        monkeypatch.setattr(warmup, "_run_whole", self._run)
        monkeypatch.setattr(warmup, "_whole_rates", lambda *given: [self._run(None, r, None) for r in given[-1]])

    def _run(self, pipeline: Any, request: Any, timer: Any) -> Any:
        self.made.append(request)
        if (error := self.errors[request]) is not None:
            raise error
        return (1.0, 1.0, 1.0)

    def start(self, bins: tuple[Any, ...] = (), num_threads: int | None = None) -> None:
        info: Any = SimpleNamespace(whole=SimpleNamespace(class_name="SomePipeline", bins=bins))
        device: Any = self.device
        warmup.warm_up_whole(SimpleNamespace(), info, device, 1, num_threads)  # type: ignore[arg-type]


@pytest.fixture
def twice_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each doubling of the threads halves the seconds of a step."""

    def mean(timer: Timer, run: Callable[[], object]) -> float:
        run()
        return 1 / timer.device.num_threads

    monkeypatch.setattr(Timer, "mean", mean)


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


def test_threads_are_those_from_before_a_step_that_fails() -> None:
    device: Any = Threads(8, {})
    timer: Any = SimpleNamespace(mean=lambda run: run())
    for fails_at in (1, 4):

        def step(most: int = fails_at) -> float:
            if device.num_threads == most:
                raise ValueError("a step fails")
            return 1 / int(device.num_threads)

        with pytest.raises(ValueError, match="a step fails"):
            choose_num_threads(device, timer, step)
        assert device.num_threads == 8


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
def test_a_failed_trial_says_every_reason_and_stops_with_the_device(
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
def test_a_trial_that_runs_out_of_memory_says_so(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    trial = TrialOf(monkeypatch, error, None)
    with pytest.raises(type(error)) as caught:
        trial.start(num_threads=1)
    assert caught.value is error
    assert trial.made == ["small"]


BYTES_PER_COPY = 100


@dataclass
class OneOfSome:
    """A request's state."""

    sequence_lengths: tuple[int, ...] = (7,)


class SmallDevice:
    """Has room for so many copies; the ranks beside it wait for ever for one that ran out of memory."""

    works_ahead = False
    survive_failures = False
    mesh = SimpleNamespace(cfg_size=1)
    capturer = None

    def __init__(self, most_copies: int) -> None:
        self.most_copies = most_copies
        self.tried: list[int] = []

    def predict(self, states: Sequence[OneOfSome], groups: Sequence[int]) -> None:
        if len(states) not in self.tried:
            self.tried.append(len(states))
        if len(states) > self.most_copies:
            raise MemoryError

    def forget(self, state: OneOfSome) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def passing_memory_bytes(self) -> int:
        return BYTES_PER_COPY * max(self.tried)

    def free_memory_bytes(self) -> int:
        return BYTES_PER_COPY * self.most_copies

    def agree(self, value: float) -> float:
        return value

    def attempt(self, run: Callable[[], object]) -> object:
        try:
            return run()
        except MemoryError as error:
            raise RanksLostError("a rank failed in the middle of a step") from error


@pytest.mark.parametrize(("most", "tried"), [(1, [1]), (7, [1, 2, 4]), (8, [1, 2, 4, 8]), (15, [1, 2, 4, 8])])
def test_ranks_that_would_be_lost_try_no_batch_that_may_not_fit(
    monkeypatch: pytest.MonkeyPatch, most: int, tried: list[int]
) -> None:
    monkeypatch.setattr(warmup, "BUDGET_SECONDS", 60.0)
    device: Any = SmallDevice(most)
    info: Any = SimpleNamespace(sequence_cost=float)
    found = measure_steps(device, OneOfSome(), info, Timer(device, device))  # type: ignore[arg-type]
    assert device.tried == tried
    assert [sample.tokens for sample in found] == [7 * copies for copies in tried]
