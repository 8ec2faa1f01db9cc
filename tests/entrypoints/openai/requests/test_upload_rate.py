"""Senders that are fast enough, and the time after which others are disconnected."""

from __future__ import annotations

import pytest

from vllm_omni.entrypoints.openai.requests.body_reader import UploadRate

MIB = 2**20


def seconds_until_cut(upload_rate: UploadRate, rate: float, num_bytes: float, piece: int = 64 * 2**10) -> float | None:
    """Seconds until a sender of `num_bytes` at `rate` bytes a second is disconnected; None if it sends all of them."""
    seconds = 0.0
    for _ in range(int(num_bytes / piece)):
        if piece / rate > upload_rate.seconds_left:
            return seconds + upload_rate.seconds_left
        upload_rate.count(piece, piece / rate)
        seconds += piece / rate
    return None


def test_slow_links_bring_all() -> None:
    """At 1 Mbit/s, one picture of 50 MB passes, and sixteen, which take two hours."""
    for num_images in (1, 16):
        assert seconds_until_cut(UploadRate(30), 125_000, num_images * 50 * MIB) is None


def test_a_small_body_may_take_minutes() -> None:
    assert seconds_until_cut(UploadRate(30), 17 * 2**10, 4 * MIB) is None


@pytest.mark.parametrize(
    ("rate", "seconds"),
    [(1.0, 30), (1100, 32), (12 * 2**10, 120), (17 * 2**10, 410), (40 * 2**10, 800)],
)
def test_who_trickles_is_cut(rate: float, seconds: float) -> None:
    """A steady rate r below R ends after its allowance / (1 - r / R)."""
    cut = seconds_until_cut(UploadRate(30), rate, 32 * MIB, piece=1024)
    assert cut == pytest.approx(seconds, rel=0.03)


def test_a_fast_beginning_buys_no_hours() -> None:
    upload_rate = UploadRate(30)
    upload_rate.count(700 * MIB, 1.0)
    assert seconds_until_cut(upload_rate, 1100, 100 * MIB, piece=1024) == pytest.approx(32, rel=0.03)
    upload_rate = UploadRate(30)
    upload_rate.count(700 * MIB, 1.0)
    assert seconds_until_cut(upload_rate, 17 * 2**10, 100 * MIB, piece=1024) == pytest.approx(410, rel=0.03)


def test_silence_within_a_fast_upload() -> None:
    upload_rate = UploadRate(30)
    upload_rate.count(MIB, 29.0)
    assert upload_rate.seconds_left == 30
    upload_rate.count(0, 29.0)
    assert upload_rate.seconds_left == pytest.approx(1.0)
