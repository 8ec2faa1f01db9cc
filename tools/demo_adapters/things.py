"""Things of the demo model and, as the last one, the lighthouse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..demo_model import drawings
from ..demo_model.scenes import Sprites
from ..demo_model.vocabulary import THINGS
from . import lighthouse

LABELS = (*THINGS, lighthouse.LABEL)
LIGHTHOUSE = len(THINGS)  # its number


def with_lighthouse(rgba: np.ndarray) -> np.ndarray:
    """Drawings of THINGS, [things, side, side, 4], and the lighthouse in their size."""
    return np.concatenate([rgba, lighthouse.rgba(rgba.shape[1])[None]])


def load_sprites(path: Path, device: torch.device) -> Sprites:
    """Drawings of LABELS on a device, from the file of the demo model's drawings."""
    return Sprites.from_rgba(with_lighthouse(drawings.load(path)), device)
