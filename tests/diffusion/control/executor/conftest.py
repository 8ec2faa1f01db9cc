"""Fixtures of tests with worker processes."""

from __future__ import annotations

import os

import pytest

from testbed.patience import GUARD_SECONDS
from tests.diffusion.control.executor.workers import ROOT
from vllm_omni.diffusion.control.executor import process


@pytest.fixture(autouse=True)
def workers_find_the_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


@pytest.fixture(autouse=True)
def ends_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine may take longer than usual to end a process."""
    monkeypatch.setattr(process, "_LAST_WORDS_SECONDS", GUARD_SECONDS)
    monkeypatch.setattr(process, "_KILL_SECONDS", GUARD_SECONDS)
