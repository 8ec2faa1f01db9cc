"""Tiny Wan models that several test modules share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.tiny_wan import build_tiny_wan


@pytest.fixture(scope="session")
def wan_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Function from a kind (see `testbed.tiny_wan.KINDS`) to its model folder with 3 heads; built once, not to be
    changed."""
    folder = tmp_path_factory.mktemp("wan")

    def build(kind: str) -> Path:
        path = folder / kind
        return path if path.exists() else build_tiny_wan(path, kind)

    return build
