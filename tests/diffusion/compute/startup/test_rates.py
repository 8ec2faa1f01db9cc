"""Rates from made-up measurements."""

from __future__ import annotations

import pytest

from vllm_omni.diffusion.compute.startup.rates import Sample, fit_line, knee


def samples(seconds_of: dict[int, float]) -> list[Sample]:
    return [Sample(tokens=t, units=2.0 * t, seconds=s) for t, s in seconds_of.items()]


def test_a_line_is_fitted() -> None:
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
