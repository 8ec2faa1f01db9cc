"""Judge of a clip: which thing it shows, and how the thing moves.

The thing is the one whose drawing fits best in the first, the middle and the last frame together. Its track is then
measured in every frame: over sides, angles and places, the pose whose picture explains most of the frame's difference
from the background, and its opacity. The motion follows from the track by rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..demo_model.judge import border_shade, fit_things
from ..demo_model.scenes import Sprites, place
from .clips import Track
from .motions import CROSSING, STILL

WORKING_SIDE = 32  # clips are reduced to about this side
THING_SIZES = (0.36, 0.44, 0.52, 0.60, 0.70, 0.82, 0.94)
LANE_SIZES = (0.80, 0.88, 0.96)
THING_TILTS = (-0.1, 0.0, 0.1)
TRACK_SIZES = (0.28, 0.34, 0.40, 0.46, 0.52, 0.58, 0.64, 0.72, 0.82, 0.92)
ANGLES = 24  # a whole turn in steps of 15 degrees

FADED, GROWN, LEANED, MOVED, JUMPED = 0.45, 1.5, math.radians(32), 0.13, 0.1
"""Smallest changes that count: of the opacity, the size's ratio, the range of the angle, and places as parts of the
clip's side."""


def clip_shade(clips: torch.Tensor) -> torch.Tensor:
    """Median colour of the border of all frames, [n, 3]; clips are [n, 3, frames, height, width] in [0, 1]."""
    frames = clips.transpose(1, 2).flatten(0, 1)
    shades: torch.Tensor = border_shade(frames).unflatten(0, (len(clips), -1))
    return shades.median(1).values


def find_things(
    clips: torch.Tensor, sprites: Sprites, sizes: Sequence[float] = THING_SIZES, frames: Sequence[int] = (0, 8, 16)
) -> torch.Tensor:
    """Best fitting thing in each clip, [n]."""
    shades = clip_shade(clips)
    score = torch.zeros(len(clips), len(sprites.full), device=clips.device)
    for frame in frames:
        score += fit_things(clips[:, :, frame], sprites, sizes, THING_TILTS, shades, WORKING_SIDE).score
    return score.argmin(1)


def _reduced(clips: torch.Tensor) -> torch.Tensor:
    """Frames of each clip, [n, frames, 3, height, width], reduced to the working side."""
    count, frames = len(clips), clips.shape[2]
    factor = max(1, min(clips.shape[3:]) // WORKING_SIDE)
    small: torch.Tensor = F.avg_pool2d(clips.transpose(1, 2).flatten(0, 1), factor).unflatten(0, (count, frames))
    return small


def measure_track(clips: torch.Tensor, things: torch.Tensor, sprites: Sprites) -> Track:
    """Pose of the given thing, [n], in every frame of each clip, [n, 3, frames, height, width] in [0, 1]."""
    shades, small = clip_shade(clips), _reduced(clips)
    tracks = [_one_track(small[i], shades[i], int(thing), sprites) for i, thing in enumerate(things)]
    return Track(*(torch.stack(values) for values in zip(*tracks, strict=True)))


def _one_track(frames: torch.Tensor, shade: torch.Tensor, thing: int, sprites: Sprites) -> tuple[torch.Tensor, ...]:
    """Size, x, y, angle and opacity in every frame, [frames, 3, height, width]."""
    height, width = frames.shape[2:]
    device = frames.device
    angles = torch.arange(ANGLES, device=device) * (2 * math.pi / ANGLES)
    difference = frames - shade[:, None, None]
    best = torch.full((len(frames),), -1.0, device=device)
    found = torch.zeros(5, len(frames), device=device)
    for size in TRACK_SIZES:
        side = min(round(size * min(height, width)), height, width)
        drawing = sprites.at(2 * side)[thing].expand(ANGLES, -1, -1, -1)
        scale = torch.ones(ANGLES, device=device)
        fine = place(drawing, (2 * side, 2 * side), scale, angles, torch.zeros(ANGLES, 2, device=device))
        templates = F.avg_pool2d(fine, 2)
        shown = templates[:, :3] - templates[:, 3:] * shade[:, None, None]
        energy = shown.square().sum((1, 2, 3)).clamp_min(1e-6)[:, None, None]
        margin = side // 6  # turned corners may lie outside
        match = F.conv2d(difference, shown, padding=margin)
        opacity = (match / energy).clamp(0, 1)
        gain = opacity * (2 * match - opacity * energy)
        most, where = gain.flatten(1).max(1)
        rows, columns = gain.shape[2:]
        turn, y, x = where // (rows * columns), where // columns % rows, where % columns
        pose = torch.stack(
            [
                0 * most + side / min(height, width),
                (x - margin + side / 2) / width - 0.5,
                (y - margin + side / 2) / height - 0.5,
                angles[turn],
                opacity.flatten(1).gather(1, where[:, None])[:, 0],
            ]
        )
        better = most > best
        best = torch.where(better, most, best)
        found = torch.where(better, pose, found)
    return tuple(found)


def _ends(values: torch.Tensor) -> tuple[float, float]:
    """Medians of the first and the last three values."""
    return float(values[:3].median()), float(values[-3:].median())


def unwound(angles: torch.Tensor) -> torch.Tensor:
    """Angles without jumps of whole turns, from the first on, [frames]."""
    steps = torch.remainder(angles[1:] - angles[:-1] + math.pi, 2 * math.pi) - math.pi
    return torch.cat([torch.zeros_like(angles[:1]), steps.cumsum(0)])


def name_motion(track: Track, i: int) -> str:
    """Motion of the i-th clip, by its track; a name of MOTIONS other than the one of two crossing things."""
    first, last = _ends(track.opacity[i])
    if abs(last - first) > FADED:
        return "fading in" if last > first else "fading out"
    first, last = _ends(track.size[i])
    if max(first / last, last / first) > GROWN:
        return "growing" if last > first else "shrinking"
    x, y = track.x[i], track.y[i]
    across, down = float(x[-3:].mean() - x[:3].mean()), float(y[-3:].mean() - y[:3].mean())
    middle = len(y) // 2
    quarter = middle // 2
    if vertical := _up_and_down(y, middle, quarter):
        return vertical
    if max(abs(across), abs(down)) > MOVED:
        if abs(across) > abs(down):
            return "moving right" if across > 0 else "moving left"
        return "moving down" if down > 0 else "moving up"
    # Turns come last: the angle of a thing that looks alike from both ends may be wrong.
    turned = unwound(track.angle[i])
    if turned[-1].abs() > 1.4 * math.pi:
        return "spinning"
    if turned.max() - turned.min() > LEANED:
        return "swinging"
    return STILL


def _up_and_down(y: torch.Tensor, middle: int, quarter: int) -> str | None:
    """Whether the thing jumps or bounces; larger y are lower."""
    start, end, centre = y[:2].mean(), y[-2:].mean(), y[middle - 1 : middle + 2].mean()
    if start - centre > JUMPED and end - centre > JUMPED:
        return "jumping"
    grounds = y[quarter - 1 : quarter + 2].max(), y[middle + quarter - 1 : middle + quarter + 2].max()
    if all(ground - centre > JUMPED for ground in grounds) and grounds[0] - start > JUMPED:
        return "bouncing"
    return None


def judge_singles(clips: torch.Tensor, sprites: Sprites) -> tuple[list[int], list[str]]:
    """Thing and motion of clips of one thing, [n, 3, frames, height, width] in [0, 1]."""
    things = find_things(clips, sprites)
    track = measure_track(clips, things, sprites)
    return things.tolist(), [name_motion(track, i) for i in range(len(clips))]


def judge_crossings(clips: torch.Tensor, sprites: Sprites) -> tuple[list[tuple[int, int]], list[str]]:
    """Things of the upper and the lower half, and "crossing" where the upper one moves right and the lower one left."""
    lanes = clips.tensor_split(2, 3)
    things, moves = [], []
    for lane in lanes:
        found = find_things(lane, sprites, LANE_SIZES)
        track = lane_places(lane)
        things.append(found.tolist())
        moves.append(track[:, -3:].mean(1) - track[:, :3].mean(1))
    crossed = (moves[0] > MOVED) & (moves[1] < -MOVED)
    return list(zip(*things, strict=True)), [CROSSING if yes else STILL for yes in crossed.tolist()]


def lane_places(lanes: torch.Tensor) -> torch.Tensor:
    """Centre across of what differs from the background, [n, frames], as a part of the width."""
    shades = clip_shade(lanes)
    weight = (lanes - shades[:, :, None, None, None]).square().sum(1)
    weight = (weight - 0.01).clamp_min(0).sum(2) + 1e-6
    places = torch.linspace(-0.5, 0.5, lanes.shape[4], device=lanes.device)
    return (weight * places).sum(2) / weight.sum(2)
