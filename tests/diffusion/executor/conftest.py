"""What tests with worker processes share."""

from __future__ import annotations

import os

import pytest

from tests.diffusion.executor.workers import ROOT


@pytest.fixture(autouse=True)
def workers_find_the_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
