"""A model whose steps resemble each other, one thread, and a case for each registered step cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.tiny_models import SMALL, build_tiny_qwen_image
from vllm_omni.diffusion.data import STEP_CACHES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that has the argument `backend` with every registered step cache."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", list(STEP_CACHES))


@pytest.fixture(autouse=True, scope="module")
def every_module(module_on_one_thread: None) -> None:
    """Let every module of this folder run on one thread."""


@pytest.fixture(scope="package")
def calm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 blocks, 4 heads; from step to step the first block's residual changes by 0.1 to 0.3."""
    path = tmp_path_factory.mktemp("cache") / "model"
    return build_tiny_qwen_image(path, layers=6, heads=4, time_scale=0.1, default_sampling_params=SMALL)
