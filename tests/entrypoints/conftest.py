"""Clients that wait for an answer as long as the suite lets a test run."""

from __future__ import annotations

import httpx
import openai
import pytest

from testbed.patience import GUARD_SECONDS


@pytest.fixture(scope="session", autouse=True)
def patient_clients() -> None:
    """These objects are the defaults of all clients; httpx would give up after 5 seconds."""
    for default in (httpx._config.DEFAULT_TIMEOUT_CONFIG, openai.DEFAULT_TIMEOUT):
        default.connect = default.read = default.write = default.pool = GUARD_SECONDS
