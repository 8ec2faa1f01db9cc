"""Fixtures of tests that start a ModelRunner."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vllm_omni.diffusion.compute.startup import warmup


@pytest.fixture
def quick_warmup(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measure as little as possible at a runner's start, with one thread."""
    monkeypatch.setattr(warmup, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(warmup, "MIN_SAMPLES", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
