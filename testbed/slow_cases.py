"""Cases of a test that the default run leaves to the thorough one."""

from __future__ import annotations

from typing import Any

import pytest


def slow_unless(value: str, *fast: str) -> Any:
    """Parameter of a test: a case of the thorough run, unless it is among `fast`."""
    return value if value in fast else pytest.param(value, marks=pytest.mark.thorough)
