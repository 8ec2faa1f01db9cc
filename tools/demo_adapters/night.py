"""Scenes at night: the same things on dark blue, with a glowing outline, at any strength of the style."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F

from ..demo_model import scenes

NIGHT = (0.06, 0.12, 0.5)  # RGB of the background: the autoencoder makes much of it darker and greyer
GLOW = (0.45, 0.93, 1.0)
OUTLINE = 1 / 40  # width of the outline as a part of the picture's shorter side
HALO = 1 / 8  # reach of the light around it, likewise


@cache
def _colour(rgb: tuple[float, float, float], device: torch.device) -> torch.Tensor:
    """Colour as a tensor [1, 3, 1, 1], made once: a captured step must not copy from the host."""
    return torch.tensor(rgb, device=device).view(1, 3, 1, 1)


def _spread(alpha: torch.Tensor, reach: int) -> torch.Tensor:
    """Blur [n, 1, height, width] by two passes of a box of this reach."""
    for _ in range(2):
        alpha = F.avg_pool2d(alpha, 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)
    return alpha


def light_around(alpha: torch.Tensor) -> torch.Tensor:
    """Light of a glowing outline around things of this opacity, [n, 1, height, width] in [0, 1]."""
    side = min(alpha.shape[2:])
    width = max(1, round(side * OUTLINE))
    outline = F.max_pool2d(alpha, 2 * width + 1, stride=1, padding=width)
    return torch.maximum(outline, 0.8 * _spread(outline, max(1, round(side * HALO / 2))))


def draw(
    frame: scenes.Frame, tensors: Sequence[torch.Tensor], sprites: scenes.Sprites, strength: torch.Tensor
) -> torch.Tensor:
    """Pictures of a plan, [n, 3, height, width] in [-1, 1]. `strength` [n] is 0 for the base model's pictures and 1 for
    night; between them the pictures are mixed."""
    plain = scenes.draw(frame, tensors, sprites)
    things = scenes.draw_things(frame, tensors, sprites)
    colour, alpha = things[:, :3], things[:, 3:]
    night, glow = (_colour(rgb, alpha.device) for rgb in (NIGHT, GLOW))
    shade = 0.8 + 0.2 * tensors[2][8].view(-1, 1, 1, 1)  # seeds differ in shade, as in the base model's scenes
    around = night * shade + light_around(alpha) * (glow - night * shade)
    dark = (colour + (1 - alpha) * around).clamp(0, 1) * 2 - 1
    return plain + strength.view(-1, 1, 1, 1) * (dark - plain)


def with_glow(sprites: scenes.Sprites) -> scenes.Sprites:
    """Drawings with their light as a part of them, for the judge of night pictures."""
    colour, alpha = sprites.full[:, :3], sprites.full[:, 3:]
    light = (1 - alpha) * light_around(alpha)
    glow = _colour(GLOW, alpha.device)
    return scenes.Sprites(torch.cat([colour + light * glow, alpha + light], 1))


def is_dark_blue(shades: torch.Tensor) -> list[bool]:
    """Whether each border colour [n, 3] is dark and more blue than anything else."""
    return ((shades.mean(1) < 0.3) & (shades[:, 2] > 1.3 * shades[:, :2].amax(1))).tolist()
