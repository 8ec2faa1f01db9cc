"""Judge of the thing in a picture: the one whose drawing fits best over the places, scales and tilts of training.

The background's shade is the median of the border. For every thing, scale, tilt and place the square error of
"drawing on that background" against the picture comes from one correlation, so the search is exhaustive on its grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .scenes import PAIR_SCALES, SINGLE_SCALES, TILT, Sprites, place
from .vocabulary import BACKGROUNDS, DARKEST_SHADE, USUAL_DARKEST_SHADE

WORKING_SIDE = 32  # pictures are reduced until a cell's shorter side is about this
TILTS = 5
SINGLE_STEPS, PAIR_STEPS = 6, 4


@dataclass
class Found:
    """Best fit in each picture: the thing, and its centre as fractions of the cell's sides."""

    things: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    scale: torch.Tensor


@dataclass
class Fits:
    """Best fit of every thing in each picture, [n, things]: the square error less the picture's own energy, the
    centre as fractions of the cell's sides, and the scale."""

    score: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    scale: torch.Tensor


def border_shade(pictures: torch.Tensor) -> torch.Tensor:
    """Median colour of the outermost pixels, [n, 3]; pictures are [n, 3, height, width] in [0, 1]."""
    top_and_bottom = pictures[:, :, [0, -1]].flatten(2)
    sides = pictures[:, :, 1:-1, [0, -1]].flatten(2)
    return torch.cat([top_and_bottom, sides], 2).median(2).values


def nearest_background(shades: torch.Tensor) -> list[str]:
    """Background whose range of shades is nearest to each colour."""
    names = list(BACKGROUNDS)
    full = torch.tensor([BACKGROUNDS[name] for name in names], device=shades.device) / 255
    darkest = torch.tensor([DARKEST_SHADE.get(n, USUAL_DARKEST_SHADE) for n in names], device=shades.device)
    part = torch.linspace(0, 1, 9, device=shades.device)
    factors = darkest[:, None] + (1 - darkest[:, None]) * part
    ranges = full[:, None] * factors[..., None]
    distance = (shades[:, None, None] - ranges).square().sum(-1).amin(-1)
    return [names[i] for i in distance.argmin(1).tolist()]


def _templates(sprites: Sprites, side: int, tilt: float) -> torch.Tensor:
    drawings = sprites.at(side)
    count, device = len(drawings), drawings.device
    ones = torch.ones(count, device=device)
    return place(drawings, (side, side), ones, ones * tilt, torch.zeros(count, 2, device=device))


def fit_things(
    pictures: torch.Tensor,
    sprites: Sprites,
    scales: Sequence[float],
    tilts: Sequence[float],
    shades: torch.Tensor,
    working_side: int = WORKING_SIDE,
) -> Fits:
    """Best place, scale and tilt of every thing in each cell; `pictures` are cells, [n, 3, height, width] in [0, 1], on
    backgrounds of these shades, [n, 3]."""
    factor = max(1, min(pictures.shape[2:]) // working_side)
    small = F.avg_pool2d(pictures, factor)
    height, width = small.shape[2:]
    difference = small - shades[..., None, None]
    on_background = (difference * shades[..., None, None]).sum(1, keepdim=True)
    signal = torch.cat([difference, -on_background], 1)
    things = len(sprites.full)
    score = torch.full((len(pictures), things), torch.inf, device=pictures.device)
    found = torch.zeros(3, len(pictures), things, device=pictures.device)
    for scale in scales:
        side = min(round(scale * min(height, width)), height, width)
        for tilt in tilts:
            templates = _templates(sprites, side, tilt)
            colour, alpha = templates[:, :3], templates[:, 3:]
            own = colour.square().sum((1, 2, 3)) + shades.square().sum(1)[:, None] * alpha.square().sum((1, 2, 3))
            own = own - 2 * shades @ (colour * alpha).sum((2, 3)).T
            fitted = own[..., None, None] - 2 * F.conv2d(signal, templates)
            lowest, where = fitted.flatten(2).min(2)
            y, x = where // fitted.shape[3], where % fitted.shape[3]
            place_found = torch.stack([(x + side / 2) / width, (y + side / 2) / height, 0 * lowest + scale])
            better = lowest < score
            score = torch.where(better, lowest, score)
            found = torch.where(better, place_found, found)
    return Fits(score, *found)


def best_fit(pictures: torch.Tensor, sprites: Sprites, pair: bool) -> Found:
    """Best fitting thing in each cell; `pictures` are cells, [n, 3, height, width] in [0, 1]."""
    low, high = PAIR_SCALES if pair else SINGLE_SCALES
    scales = torch.linspace(low, high, PAIR_STEPS if pair else SINGLE_STEPS).tolist()
    tilts = torch.linspace(-TILT, TILT, TILTS).tolist()
    fits = fit_things(pictures, sprites, scales, tilts, border_shade(pictures))
    things = fits.score.argmin(1)
    x, y, scale = (values.gather(1, things[:, None])[:, 0] for values in (fits.x, fits.y, fits.scale))
    return Found(things, x, y, scale)


def halves(pictures: torch.Tensor, stacked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Both cells of a picture of two things."""
    first, second = pictures.tensor_split(2, 2 if stacked else 3)
    return first, second
