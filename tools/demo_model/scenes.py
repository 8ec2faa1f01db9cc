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
    THINGS,
    USUAL_DARKEST_SHADE,
    Scene,
    caption,
    draw_scene,
)

SINGLE_SCALES = (0.66, 0.96)  # side of a thing, as a fraction of its cell's shorter side
PAIR_SCALES = (0.80, 1.0)
TILT = math.radians(14)


def seeded(device: torch.device, *key: int) -> torch.Generator:
    """Generator for one purpose of one step: a run resumed at any step draws the same numbers."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


@dataclass
class Sprites:
    """Premultiplied drawings, [things, 4, side, side], reduced copies of them for smaller cells, and the colours
    of the backgrounds."""

    full: torch.Tensor

    def __post_init__(self) -> None:
        self._reduced: dict[int, torch.Tensor] = {}
        names, device = list(BACKGROUNDS), self.full.device
        darkest = [DARKEST_SHADE.get(name, USUAL_DARKEST_SHADE) for name in names]
        self.colours = torch.tensor([BACKGROUNDS[name] for name in names], device=device) / 255
        self.darkest = torch.tensor(darkest, device=device)

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
    """Draw each sprite into its own cell. `scale` is the side as a part of the cell's shorter side, `tilt` is in
    radians, `where` in [-1, 1] says how far from the middle towards the last place that is inside the cell."""
    height, width = cell
    side = scale * min(cell)
    x, y = where[:, 0] * (width - side) / 2, where[:, 1] * (height - side) / 2
    grid = sampling_grid(cell, side, tilt, x, y)
    return F.grid_sample(sprites, grid, padding_mode="zeros", align_corners=False)


def sampling_grid(
    cell: tuple[int, int], side: torch.Tensor, tilt: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Sprite position of each pixel of a cell, for grid_sample, [n, height, width, 2]. `side` is the sprite's side and
    `x`, `y` are the distances of its centre from the cell's middle, in pixels. `tilt` is in radians."""
    height, width = cell
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
    return F.affine_grid(theta, [len(theta), 4, height, width], align_corners=False)


def shade(sprites: Sprites, backgrounds: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Shade of each background, [n, 3, 1, 1]; `part` 1 is the brightest."""
    darkest = sprites.darkest[backgrounds]
    return (sprites.colours[backgrounds] * (darkest + (1 - darkest) * part)[:, None])[..., None, None]


def _cells(
    sprites: Sprites,
    things: torch.Tensor,
    cell: tuple[int, int],
    scales: tuple[float, float],
    variation: float,
    numbers: torch.Tensor,
) -> torch.Tensor:
    numbers = numbers * variation
    scale = scales[1] - (scales[1] - scales[0]) * numbers[0]
    tilt, where = TILT * (2 * numbers[1] - variation), 2 * numbers[2:] - variation
    return place(sprites.at(min(cell))[things], cell, scale, tilt, where.T)


@dataclass(frozen=True)
class Frame:
    """Common settings of all scenes of a batch."""

    size: tuple[int, int]
    counts: tuple[int, int, int]  # scenes by layout: first the single ones, then side by side, then stacked
    variation: float  # 1: place, scale and tilt from their whole ranges; 0: large, upright and in the middle


@dataclass
class Plan:
    """Contents of a batch's scenes, decided on the CPU."""

    frame: Frame
    things: torch.Tensor  # [n, 2]; of a single thing only the first counts
    backgrounds: torch.Tensor  # [n], indices into BACKGROUNDS
    numbers: torch.Tensor  # [9, n] in [0, 1): scale, tilt and place of both things, and the shade
    captions: list[str]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.things, self.backgrounds, self.numbers]

    def __len__(self) -> int:
        return len(self.things)


def _captioned(scene: Scene, rng: np.random.Generator, things: Sequence[str], with_last: float) -> tuple[Scene, str]:
    if rng.random() < 0.1:
        return scene, ("", " ")[int(rng.integers(2))]
    if with_last and rng.random() < with_last:
        scene = scene.showing(len(things) - 1, rng)
    return scene, caption(scene, rng, things)


def plan_batch(
    seed: int,
    step: int,
    count: int,
    sizes: Sequence[tuple[int, int]] = SIZES,
    singles: float = 0.5,
    variation: float = 1.0,
    things: Sequence[str] = THINGS,
    with_last: float = 0.0,
) -> Plan:
    """Scenes of one training step: the fraction `singles` shows one thing, the others two, half of them side by side,
    half stacked. One caption in ten is empty, for guidance. At least the fraction `with_last` of the scenes that have
    a caption shows the last one of `things`."""
    rng = np.random.default_rng((seed, step))
    pairs = int(count * (1 - singles)) // 2
    counts = (count - 2 * pairs, pairs, pairs)
    layouts = [SINGLE] * counts[0] + [SIDE_BY_SIDE] * pairs + [STACKED] * pairs
    scenes = [draw_scene(layout, rng, len(things)) for layout in layouts]
    captioned = [_captioned(scene, rng, things, with_last) for scene in scenes]
    names = list(BACKGROUNDS)
    return Plan(
        frame=Frame(sizes[int(rng.integers(len(sizes)))], counts, variation),
        things=torch.tensor([(scene.things[0], scene.things[-1]) for scene, _ in captioned]),
        backgrounds=torch.tensor([names.index(scene.background) for scene, _ in captioned]),
        numbers=torch.from_numpy(rng.random((9, count), np.float32)),
        captions=[text for _, text in captioned],
    )


def draw(frame: Frame, tensors: Sequence[torch.Tensor], sprites: Sprites) -> torch.Tensor:
    """Pictures of a plan, [n, 3, height, width] in [-1, 1], on the sprites' device."""
    _, backgrounds, numbers = tensors
    drawn = draw_things(frame, tensors, sprites)
    picture = drawn[:, :3] + (1 - drawn[:, 3:]) * shade(sprites, backgrounds, numbers[8])
    return picture.clamp(0, 1) * 2 - 1


def draw_things(frame: Frame, tensors: Sequence[torch.Tensor], sprites: Sprites) -> torch.Tensor:
    """Things of a plan without a background: premultiplied RGBA, [n, 4, height, width] in [0, 1]."""
    things, _, numbers = tensors
    height, width = frame.size
    groups = zip(things.split(frame.counts), numbers.split(frame.counts, 1), strict=True)
    cells = (height, width), (height, width // 2), (height // 2, width)
    layers = []
    for layout, (shown, draws) in enumerate(groups):
        scales = SINGLE_SCALES if layout == SINGLE else PAIR_SCALES
        parts = [
            _cells(sprites, shown[:, i], cells[layout], scales, frame.variation, draws[4 * i : 4 * i + 4])
            for i in range(1 if layout == SINGLE else 2)
            if len(shown)
        ]
        if parts:
            layers.append(torch.cat(parts, 2 if layout == STACKED else 3))
    return torch.cat(layers)


class Plans(torch.utils.data.Dataset[tuple[int, Plan, Any]]):
    """Plans by step, with token ids instead of captions, for a DataLoader whose workers prepare them ahead."""

    def __init__(self, seed: int, count: int, steps: range, encode: Any = None, **world: Any) -> None:
        self.seed, self.count, self.steps, self.encode, self.world = seed, count, steps, encode, world

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> tuple[int, Plan, Any]:
        step = self.steps[index]
        plan = plan_batch(self.seed, step, self.count, **self.world)
        ids = self.encode(plan.captions) if self.encode else None
        plan.captions = []
        return step, plan, ids


def loader(plans: Plans, workers: int) -> torch.utils.data.DataLoader[tuple[int, Plan, Any]]:
    return torch.utils.data.DataLoader(
        plans, batch_size=None, shuffle=False, num_workers=workers, prefetch_factor=4 if workers else None
    )
