"""Clips of moving things: planned on the CPU, drawn on any device, from seeds alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from ..demo_model.scenes import Sprites, sampling_grid, shade
from ..demo_model.vocabulary import BACKGROUNDS, THINGS
from .motions import CAN_CROSS_ITSELF, CROSSING, FRAMES, MOTIONS, SIDE, Motion, can_show, caption

SMALLEST = 0.42  # size at the small end of a growth, as a part of the largest size
TILT = math.radians(5)
LEAN = math.radians(36)  # largest angle of a swing
REACH = (0.82, 1.0)  # part of the free way that a moving thing takes
CROSSINGS = 0.12  # part of the clips with two things
SUPERSAMPLING = 2
NUMBERS = 7

_NAMES = tuple(MOTIONS)
_STRENGTHS = tuple(f.name for f in fields(Motion) if f.name not in ("phrases", "sizes"))


@dataclass(frozen=True)
class Footage:
    """Common settings of all clips of a batch: first the clips of one thing, then those of two crossing things."""

    frames: int = FRAMES
    side: int = SIDE
    singles: int = 0
    crossings: int = 0


@dataclass
class ClipPlan:
    """Contents of a batch's clips."""

    footage: Footage
    things: torch.Tensor  # [n, 2]; of a single thing only the first counts
    motions: torch.Tensor  # [n], indices into MOTIONS
    backgrounds: torch.Tensor  # [n], indices into BACKGROUNDS
    numbers: torch.Tensor  # [NUMBERS, n] in [0, 1): size, tilt, place across and down, reach, shade, second size

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.things, self.motions, self.backgrounds, self.numbers]

    def captions(self, rng: np.random.Generator) -> list[str]:
        names = list(BACKGROUNDS)
        rows = zip(self.things.tolist(), self.motions.tolist(), self.backgrounds.tolist(), strict=True)
        return [caption((first, second), _NAMES[m], names[b], rng) for (first, second), m, b in rows]


_VISIBLE = np.array([[can_show(motion, i) for motion in _NAMES] for i in range(len(THINGS))])


def _shown(things: np.ndarray, motions: np.ndarray) -> np.ndarray:
    """Motions, with those that cannot be seen replaced by the first, standing still."""
    return np.where(_VISIBLE[things, motions], motions, 0)


def plan_clips(seed: int, step: int, count: int, frames: int = FRAMES, side: int = SIDE) -> ClipPlan:
    """Clips of one training step; `frames` and `side` are pixels and frames of each clip."""
    rng = np.random.default_rng((seed, step))
    crossings = int(count * CROSSINGS)
    first, second = rng.integers(len(THINGS), size=(2, count))
    second = np.where((second == first) | (rng.random(count) < 0.5), first, second)
    alone = first == second
    first[alone] = second[alone] = np.array(CAN_CROSS_ITSELF)[rng.integers(len(CAN_CROSS_ITSELF), size=alone.sum())]
    motions = rng.integers(len(_NAMES) - 1, size=count)  # without the last, crossing
    any_thing = rng.integers(len(THINGS), size=count)
    singles = count - crossings
    first[:singles] = any_thing[:singles]
    motions[:singles] = _shown(first[:singles], motions[:singles])
    motions[singles:] = _NAMES.index(CROSSING)
    white = rng.random(count) < 0.3
    backgrounds = np.where(white, list(BACKGROUNDS).index("white"), rng.integers(len(BACKGROUNDS), size=count))
    return ClipPlan(
        footage=Footage(frames, side, singles, crossings),
        things=torch.from_numpy(np.stack([first, second], 1)),
        motions=torch.from_numpy(motions),
        backgrounds=torch.from_numpy(backgrounds),
        numbers=torch.from_numpy(rng.random((NUMBERS, count), np.float32)),
    )


@dataclass
class Track:
    """Pose of things in every frame, each [n, frames]: side and centre as parts of the clip's side, the centre from the
    middle; the angle in radians, clockwise; the opacity in [0, 1]."""

    size: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    angle: torch.Tensor
    opacity: torch.Tensor


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Strengths of all motions, [motions, kinds], and their ranges of sizes, [motions, 2]. Kept, because a CUDA graph
    cannot capture their transfer."""
    strengths = [[float(getattr(motion, name)) for name in _STRENGTHS] for motion in MOTIONS.values()]
    sizes = [motion.sizes for motion in MOTIONS.values()]
    return torch.tensor(strengths, device=device), torch.tensor(sizes, device=device)


def track_of(motions: torch.Tensor, numbers: torch.Tensor, frames: int) -> Track:
    """Tracks of these motions, [n], in clips of so many frames; `numbers` as in a plan."""
    device = motions.device
    strengths, sizes = _tables(device)
    row = strengths[motions]
    strength = {name: row[:, i, None] for i, name in enumerate(_STRENGTHS)}
    low, high = sizes[motions].unbind(1)
    largest, tilt, across, below, reach = (numbers[i, :, None] for i in range(5))
    largest = low[:, None] + (high - low)[:, None] * largest
    reach = REACH[0] + (REACH[1] - REACH[0]) * reach
    t = torch.linspace(0, 1, frames, device=device)[None] if frames > 1 else torch.zeros(1, 1, device=device)

    growth = strength["growth"]
    left_to_grow = torch.where(growth > 0, 1 - t, t) * growth.abs()
    size = largest * (1 - (1 - SMALLEST) * left_to_grow)
    swinging = strength["swing"] * LEAN * torch.sin(2 * math.pi * t)
    angle = TILT * (2 * tilt - 1) + 2 * math.pi * strength["turns"] * t + swinging
    shown = (t / 0.85).clamp(max=1)
    fade = strength["fade"]
    opacity = torch.where(fade > 0, shown, torch.where(fade < 0, shown.flip(1), torch.ones_like(t)))

    height = (((t - 0.125) / 0.75).clamp(0, 1) * 2 - 1).square()  # 1 on the ground, 0 at the top of a jump
    falls = 1 - 2 * (1 - 0.4 * t) * torch.cos(2 * math.pi * t).abs()
    x = strength["right"] * (2 * t - 1)
    y = strength["down"] * (2 * t - 1) + strength["jump"] * (2 * height - 1) + strength["bounce"] * falls
    moves_x = strength["right"].abs()
    moves_y = strength["down"].abs() + strength["jump"] + strength["bounce"]
    x = reach * x + (1 - moves_x * reach) * (2 * across - 1)
    y = reach * y + (1 - moves_y * reach) * (2 * below - 1)
    room = (1 - largest) / 2
    return Track(size, x * room, y * room, angle, opacity)


def draw_layer(things: torch.Tensor, track: Track, side: int, sprites: Sprites) -> torch.Tensor:
    """Premultiplied pictures of the things on their tracks, [n, 4, frames, side, side]."""
    count, frames = track.size.shape
    pixels = side * SUPERSAMPLING
    parts = (track.size, track.angle, track.x, track.y)
    size, angle, x, y = (part.expand(count, frames).reshape(-1) for part in parts)
    grid = sampling_grid((pixels, pixels), size * pixels, angle, x * pixels, y * pixels)
    # All frames of a clip in one tall picture, so that its sprite is not copied for each.
    tall = F.grid_sample(
        sprites.at(side)[things],
        grid.view(count, frames * pixels, pixels, 2),
        padding_mode="zeros",
        align_corners=False,
    )
    layer = F.avg_pool2d(tall, SUPERSAMPLING).view(count, 4, frames, side, side)
    return layer * track.opacity.expand(count, frames)[:, None, :, None, None]


def crossing_tracks(motions: torch.Tensor, numbers: torch.Tensor, frames: int) -> tuple[Track, Track]:
    """Tracks of both things: in the upper half to the right, in the lower half to the left."""
    upper = track_of(motions, numbers, frames)
    # The lower thing has its own size and place across.
    lower = track_of(motions, torch.stack([numbers[i] for i in (6, 1, 3, 2, 4, 5, 0)]), frames)
    for track, middle, sign in ((upper, -0.25, 1), (lower, 0.25, -1)):
        track.y = middle + 0 * track.y
        track.x = sign * track.x
    return upper, lower


def draw_clips(footage: Footage, tensors: list[torch.Tensor], sprites: Sprites) -> torch.Tensor:
    """Clips of a plan, [n, 3, frames, side, side] in [-1, 1], on the sprites' device."""
    things, motions, backgrounds, numbers = tensors
    frames, side = footage.frames, footage.side
    layers = []
    for part in (slice(footage.singles), slice(footage.singles, None)):
        shown, chosen, drawn = things[part], motions[part], numbers[:, part]
        if not len(shown):
            continue
        if part.start is None:
            layers.append(draw_layer(shown[:, 0], track_of(chosen, drawn, frames), side, sprites))
        else:
            tracks = crossing_tracks(chosen, drawn, frames)
            upper, lower = (draw_layer(shown[:, i], track, side, sprites) for i, track in enumerate(tracks))
            layers.append(upper + lower)
    layer = torch.cat(layers)
    colour = shade(sprites, backgrounds, numbers[5])[:, :, None]
    return (layer[:, :3] + (1 - layer[:, 3:]) * colour).clamp(0, 1) * 2 - 1
