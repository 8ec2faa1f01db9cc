"""Waiting in tests: for a condition, never for a time, so that no machine is too slow."""

from __future__ import annotations

import asyncio
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")

_PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
GUARD_SECONDS = float(tomllib.loads(_PYPROJECT.read_text())["tool"]["pytest"]["ini_options"]["timeout"])
"""pytest's own limit of a test, which ends it before any wait of this length.

It ends what pytest cannot: threads and processes of a test that has failed. It also stands for the product's limits
where a test must not reach them.
"""


def wait_for(condition: Callable[[], Value | None]) -> Value:
    """Poll `condition` until it returns something true, and return that."""
    end = time.monotonic() + GUARD_SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.005)
    return value


async def until(condition: Callable[[], object]) -> None:
    """Poll `condition` on the running event loop until it returns something true."""
    async with asyncio.timeout(GUARD_SECONDS):
        while not condition():  # noqa: ASYNC110  (conditions are of things that have no events)
            await asyncio.sleep(0.002)
