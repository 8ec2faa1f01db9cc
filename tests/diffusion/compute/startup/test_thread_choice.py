"""Number of CPU threads from made-up measurements."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_omni.diffusion.compute.startup.rank_timer import choose_num_threads


class Threads:
    """A fake device. `seconds`: of a step, by number of threads in use."""

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
def test_threads_are_doubled_while_a_step_gains(most: int, seconds: dict[int, float], chosen: int) -> None:
    device = Threads(most, seconds)

    class FakeTimer:
        def mean(self, run: Callable[[], object]) -> float:
            return device.seconds[device.num_threads]

    choose_num_threads(device, FakeTimer(), lambda: None)  # type: ignore[arg-type]
    assert device.num_threads == chosen


def test_a_failing_step_leaves_the_number_of_threads() -> None:
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
