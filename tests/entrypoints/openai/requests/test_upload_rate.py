"""Senders that are cut because they are too slow, by the seconds that their bytes take."""

from __future__ import annotations

import pytest

from vllm_omni.entrypoints.openai.requests.upload_rate import Pace

MIB = 2**20


def seconds_until_cut(pace: Pace, rate: float, num_bytes: float, piece: int = 64 * 2**10) -> float | None:
    """Seconds until a sender of `num_bytes` at `rate` bytes a second is cut; None if it may send all of them."""
    seconds = 0.0
    for _ in range(int(num_bytes / piece)):
        if piece / rate > pace.patience:
            return seconds + pace.patience
        pace.count(piece, piece / rate)
        seconds += piece / rate
    return None


def test_slow_links_bring_all() -> None:
    """1 Mbit/s: a picture of 50 MB, and sixteen, which take two hours."""
    for num_images in (1, 16):
        assert seconds_until_cut(Pace(30), 125_000, num_images * 50 * MIB) is None


def test_a_small_body_may_take_minutes() -> None:
    assert seconds_until_cut(Pace(30), 17 * 2**10, 4 * MIB) is None


@pytest.mark.parametrize(
    ("rate", "seconds"),
    [(1.0, 30), (1100, 32), (12 * 2**10, 120), (17 * 2**10, 410), (40 * 2**10, 800)],
)
def test_who_trickles_is_cut(rate: float, seconds: float) -> None:
    """A steady rate r below R ends after its allowance / (1 - r / R)."""
    cut = seconds_until_cut(Pace(30), rate, 32 * MIB, piece=1024)
    assert cut == pytest.approx(seconds, rel=0.03)


def test_a_fast_beginning_buys_no_hours() -> None:
    pace = Pace(30)
    pace.count(700 * MIB, 1.0)
    assert seconds_until_cut(pace, 1100, 100 * MIB, piece=1024) == pytest.approx(32, rel=0.03)
    pace = Pace(30)
    pace.count(700 * MIB, 1.0)
    assert seconds_until_cut(pace, 17 * 2**10, 100 * MIB, piece=1024) == pytest.approx(410, rel=0.03)


def test_silence_within_a_fast_upload() -> None:
    pace = Pace(30)
    pace.count(MIB, 29.0)
    assert pace.patience == 30
    pace.count(0, 29.0)
    assert pace.patience == pytest.approx(1.0)
