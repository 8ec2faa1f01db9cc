from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vllm_omni

MODEL = Path(vllm_omni.__file__).parent / "demo_model"
THUMBNAILS = Path(__file__).with_name("thumbnails.npz")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from tools.demo_model.sampling import load_pipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_pipeline(MODEL, "cpu")


@pytest.fixture(scope="module")
def thumbnails() -> np.ndarray:
    with np.load(THUMBNAILS) as file:
        rgba: np.ndarray = file["rgba"]
        return rgba


@pytest.fixture(scope="module")
def sprites(thumbnails: np.ndarray) -> Any:
    from tools.demo_model.scenes import Sprites

    return Sprites.from_rgba(thumbnails, torch.device("cpu"))


@pytest.fixture
def real_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotation with real arithmetic, as in trainings, until the test ends."""
    from diffusers.models.transformers import transformer_qwenimage
    from tools.demo_model import network

    rotation = "apply_rotary_emb_qwen"
    monkeypatch.setattr(transformer_qwenimage, rotation, getattr(transformer_qwenimage, rotation))
    network.use_real_rotary_embedding()  # taken back with the line above
