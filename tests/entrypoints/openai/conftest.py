from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest

from testbed.live_server import LiveServer, live_server

STOPPING_SECONDS = 0.05


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """A server shared by the tests of a module that do not change its state."""
    with live_server() as running:
        yield running


@pytest.fixture
def sdk(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[LiveServer], pytest.LogCaptureFixture]]:
    """Capture uvicorn's log too, which does not propagate, and let uvicorn stop at once."""
    logger = logging.getLogger("uvicorn.error")

    def watch(server: LiveServer) -> pytest.LogCaptureFixture:
        logger.addHandler(caplog.handler)
        server.http.config.timeout_graceful_shutdown = STOPPING_SECONDS  # type: ignore[assignment]  # as asyncio takes it
        return caplog

    yield watch
    logger.removeHandler(caplog.handler)
