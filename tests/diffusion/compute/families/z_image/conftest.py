"""Fixtures of the Z-Image tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.tiny_models import SMALL
from testbed.tiny_z_image import BASE_SHIFT, build_tiny_z_image


@pytest.fixture(autouse=True, scope="module")
def every_module(module_on_one_thread: None) -> None:
    """Let every module of this folder run on one thread."""


@pytest.fixture(scope="session")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Z-Image-Turbo with 3 heads; pictures of 64x64 by default."""
    return build_tiny_z_image(tmp_path_factory.mktemp("models") / "turbo", default_sampling_params=SMALL)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Z-Image with 5 heads."""
    path = tmp_path_factory.mktemp("models") / "base"
    return build_tiny_z_image(path, heads=5, shift=BASE_SHIFT, seed=1, default_sampling_params=SMALL)
