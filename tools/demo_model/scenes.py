"""Scenes as pictures: things placed, scaled and turned on a background, on any device, from seeds alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .vocabulary import (
    BACKGROUNDS,
    DARKEST_SHADE,
    SIDE_BY_SIDE,
    SINGLE,
    SIZES,
    STACKED,
    USUAL_DARKEST_SHADE,
    caption,
    draw_scene,
)

SINGLE_SCALES = (0.66, 0.96)  # a thing's side, as a part of its cell's shorter side
PAIR_SCALES = (0.80, 1.0)
TILT = math.radians(14)


def seeded(device: torch.device, *key: int) -> torch.Generator:
    """A generator for one purpose of one step: resuming at any step continues the same stream."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


@dataclass
class Sprites:
    """Premultiplied drawings, [things, 4, side, side], and reduced copies of them for smaller cells."""

    full: torch.Tensor

    def __post_init__(self) -> None:
        self._reduced: dict[int, torch.Tensor] = {}

    @classmethod
    def from_rgba(cls, rgba: np.ndarray, device: torch.device) -> Sprites:
        straight = torch.from_numpy(rgba).to(device).permute(0, 3, 1, 2).float() / 255
        alpha = straight[:, 3:]
        return cls(torch.cat([straight[:, :3] * alpha, alpha], 1))

    def at(self, side: int) -> torch.Tensor:
        if side >= self.full.shape[-1]:
            return self.full
        if side not in self._reduced:
            self._reduced[side] = F.interpolate(self.full, (side, side), mode="bilinear", antialias=True)
        return self._reduced[side]


def place(
    sprites: torch.Tensor,
    cell: tuple[int, int],
    scale: torch.Tensor,
    tilt: torch.Tensor,
    where: torch.Tensor,
) -> torch.Tensor:
    """Draws each sprite into its own cell. `scale` is the side as a part of the cell's shorter side, `tilt` is in
    radians, `where` in [-1, 1] says how far from the middle towards the last place that is inside the cell."""
    height, width = cell
    side = scale * min(cell)
    x, y = where[:, 0] * (width - side) / 2, where[:, 1] * (height - side) / 2
    cos, sin = torch.cos(tilt), torch.sin(tilt)
    rows = [
        cos * width,
        sin * height,
        -2 * (cos * x + sin * y),
        -sin * width,
        cos * height,
        -2 * (cos * y - sin * x),
    ]
    theta = torch.stack(rows, 1).view(-1, 2, 3) / side.view(-1, 1, 1)
    grid = F.affine_grid(theta, [len(sprites), 4, height, width], align_corners=False)
    return F.grid_sample(sprites, grid, padding_mode="zeros", align_corners=False)


def shade(names: list[str], generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """One shade of each named background, [n, 3, 1, 1]."""
    full = torch.tensor([BACKGROUNDS[name] for name in names], device=device) / 255
    darkest = torch.tensor([DARKEST_SHADE.get(name, USUAL_DARKEST_SHADE) for name in names], device=device)
    part = torch.rand(len(names), generator=generator, device=device)
    return (full * (darkest + (1 - darkest) * part)[:, None])[..., None, None]


def _cells(
    sprites: Sprites,
    things: torch.Tensor,
    cell: tuple[int, int],
    scales: tuple[float, float],
    variation: float,
    generator: torch.Generator,
) -> torch.Tensor:
    device = sprites.full.device
    draws = torch.rand(4, len(things), generator=generator, device=device) * variation
    scale = scales[1] - (scales[1] - scales[0]) * draws[0]
    tilt, where = TILT * (2 * draws[1] - variation), 2 * draws[2:] - variation
    return place(sprites.at(min(cell))[things], cell, scale, tilt, where.T)


@dataclass
class Plan:
    """What a batch shows, decided on the CPU: scenes grouped by layout, their captions and the size of all of them."""

    size: tuple[int, int]
    things: list[torch.Tensor]  # per layout: [n] or [n, 2]
    backgrounds: list[str]
    captions: list[str]
    variation: float  # 1: place, scale and tilt from their whole ranges; 0: large, upright and in the middle

    def __len__(self) -> int:
        return len(self.backgrounds)


def plan_batch(
    seed: int,
    step: int,
    count: int,
    sizes: Sequence[tuple[int, int]] = SIZES,
    singles: float = 0.5,
    variation: float = 1.0,
) -> Plan:
    """The scenes of one training step: the part `singles` of them single things, the rest two
    things, side by side as often as stacked. One caption in ten is empty, for guidance."""
    rng = np.random.default_rng((seed, step))
    pairs = int(count * (1 - singles)) // 2
    layouts = [SINGLE] * (count - 2 * pairs) + [SIDE_BY_SIDE] * pairs + [STACKED] * pairs
    scenes = [draw_scene(layout, rng) for layout in layouts]
    texts = [("", " ")[int(rng.integers(2))] if rng.random() < 0.1 else caption(scene, rng) for scene in scenes]
    groups = [[s.things for s in scenes if s.layout == layout] for layout in (SINGLE, SIDE_BY_SIDE, STACKED)]
    return Plan(
        size=sizes[int(rng.integers(len(sizes)))],
        things=[torch.tensor(group, dtype=torch.long) for group in groups],
        backgrounds=[scene.background for scene in scenes],
        captions=texts,
        variation=variation,
    )


def draw(plan: Plan, sprites: Sprites, generator: torch.Generator) -> torch.Tensor:
    """The pictures of a plan, [n, 3, height, width] in [-1, 1]."""
    device = sprites.full.device
    height, width = plan.size
    single, beside, stacked = (group.to(device) for group in plan.things)
    layers = []
    if len(single):
        layers.append(_cells(sprites, single[:, 0], (height, width), SINGLE_SCALES, plan.variation, generator))
    for pairs, cell, axis in ((beside, (height, width // 2), 3), (stacked, (height // 2, width), 2)):
        if len(pairs):
            halves = [_cells(sprites, pairs[:, i], cell, PAIR_SCALES, plan.variation, generator) for i in (0, 1)]
            layers.append(torch.cat(halves, axis))
    drawn = torch.cat(layers)
    picture = drawn[:, :3] + (1 - drawn[:, 3:]) * shade(plan.backgrounds, generator, device)
    return picture.clamp(0, 1) * 2 - 1


class Plans(torch.utils.data.Dataset[tuple[int, Plan, Any]]):
    """Plans by step, with their captions as token ids, for a DataLoader whose workers prepare them ahead."""

    def __init__(self, seed: int, count: int, steps: range, encode: Any = None, **world: Any) -> None:
        self.seed, self.count, self.steps, self.encode, self.world = seed, count, steps, encode, world

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> tuple[int, Plan, Any]:
        step = self.steps[index]
        plan = plan_batch(self.seed, step, self.count, **self.world)
        return step, plan, self.encode(plan.captions) if self.encode else None


def loader(plans: Plans, workers: int) -> torch.utils.data.DataLoader[tuple[int, Plan, Any]]:
    return torch.utils.data.DataLoader(
        plans, batch_size=None, shuffle=False, num_workers=workers, prefetch_factor=4 if workers else None
    )
