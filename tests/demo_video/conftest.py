"""Drawings for the tests of the video model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tools.demo_model.scenes import Sprites

from tests.demo_model.conftest import THUMBNAILS


@pytest.fixture(scope="session")
def thumbnails() -> Sprites:
    """All drawings, 40x40."""
    with np.load(THUMBNAILS) as file:
        return Sprites.from_rgba(file["rgba"], torch.device("cpu"))
