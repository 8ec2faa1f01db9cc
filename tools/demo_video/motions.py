"""Motions of the video model: their tracks, and the captions that name them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..demo_model.vocabulary import BACKGROUNDS, NO_ARTICLE, OTHER_NAMES, THINGS, name_of, on_background

FRAMES = 17
SIDE = 64
FRAMES_PER_SECOND = 8

STILL, CROSSING = "still", "crossing"


@dataclass(frozen=True)
class Motion:
    """Track of a thing, as the strength of each kind of movement, and the words for it, the usual ones first."""

    phrases: tuple[str, ...]
    sizes: tuple[float, float]
    """Side of the thing at its largest, as a part of the clip's side: smallest and largest."""
    right: float = 0
    """1: from the left border to the right one, -1: the other way."""
    down: float = 0
    jump: float = 0
    """1: from the lower border to the upper one and back."""
    bounce: float = 0
    """1: falls from the upper border and touches the lower one twice."""
    growth: float = 0
    """1: grows to its largest size, -1: shrinks from it."""
    turns: float = 0
    """Whole turns, clockwise."""
    swing: float = 0
    """1: leans to both sides."""
    fade: float = 0
    """1: fades in, -1: fades out."""


_MOVING, _TURNING, _FADING = (0.50, 0.60), (0.58, 0.72), (0.56, 0.84)
MOTIONS: dict[str, Motion] = {
    STILL: Motion(("standing still",), (0.56, 0.84)),
    "moving right": Motion(("moving right", "moving to the right", "going right"), _MOVING, right=1),
    "moving left": Motion(("moving left", "moving to the left", "going left"), _MOVING, right=-1),
    "moving up": Motion(("moving up", "going up", "rising"), _MOVING, down=-1),
    "moving down": Motion(("moving down", "going down", "falling"), _MOVING, down=1),
    "jumping": Motion(("jumping", "hopping"), _MOVING, jump=1),
    "bouncing": Motion(("bouncing", "bouncing up and down"), _MOVING, bounce=1),
    "growing": Motion(("growing", "getting bigger"), (0.80, 0.96), growth=1),
    "shrinking": Motion(("shrinking", "getting smaller"), (0.80, 0.96), growth=-1),
    "spinning": Motion(("spinning", "turning", "rotating"), _TURNING, turns=1),
    "swinging": Motion(("swinging", "rocking"), _TURNING, swing=1),
    "fading in": Motion(("fading in", "appearing"), _FADING, fade=1),
    "fading out": Motion(("fading out", "disappearing"), _FADING, fade=-1),
    CROSSING: Motion(("crossing",), (0.42, 0.48), right=1),
}
"""The order is the order of a plan's numbers. Of two crossing things the upper one moves right, the lower one left."""

OTHER_NAMES_HERE: dict[str, str] = OTHER_NAMES | {"soccer ball": "ball"}

ROUND = frozenset(["baseball", "basketball", "cookie", "full moon", "soccer ball", "sun"])
"""Things that look nearly the same turned: they are never shown spinning or swinging."""

_PLURALS = {"pile of poo": "piles of poo", "cup of coffee": "cups of coffee", "mouse": "mice", "fish": "fish"}
_PLURAL_ENDS = {"leaf": "leaves", "snowman": "snowmen", "clover": "clovers", " fish": " fish"}


def plural(name: str) -> str | None:
    """Plural of a thing's name, None where English has no simple one."""
    if name in NO_ARTICLE or " with " in name or name in ("face in love", "magnifying glass tilted left", "lightning"):
        return None
    if name in _PLURALS:
        return _PLURALS[name]
    for end, replaced in _PLURAL_ENDS.items():
        if name.endswith(end):
            return name[: -len(end)] + replaced
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    if name.endswith(("s", "x", "sh", "ch", "tomato", "volcano")):
        return name + "es"
    return name + "s"


def names_of(label: str) -> tuple[str, ...]:
    """Every name of the thing with this label."""
    return (label, OTHER_NAMES_HERE[label]) if label in OTHER_NAMES_HERE else (label,)


def can_show(motion: str, thing: int) -> bool:
    """Whether the motion is visible with this thing."""
    return THINGS[thing] not in ROUND or not (MOTIONS[motion].turns or MOTIONS[motion].swing)


def subject(things: tuple[int, int], motion: str, rng: np.random.Generator) -> str:
    """Random name of the thing that moves, or of both."""
    first, second = things
    if motion != CROSSING:
        return name_of(first, rng, 0.75, OTHER_NAMES_HERE)
    if first == second:
        plurals = [many for name in names_of(THINGS[first]) if (many := plural(name))]
        return f"two {plurals[int(rng.integers(len(plurals)))]}"
    return " and ".join(name_of(thing, rng, 0.75, OTHER_NAMES_HERE) for thing in things)


def caption(things: tuple[int, int], motion: str, background: str, rng: np.random.Generator) -> str:
    """Random sentence that describes the clip."""
    text = subject(things, motion, rng)
    phrases = MOTIONS[motion].phrases
    if motion != STILL or rng.random() < 0.4:
        usual = rng.random() < 0.6
        text = f"{text} {phrases[0 if usual else int(rng.integers(len(phrases)))]}"
    text = on_background(text, background, rng)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.15 else text


def words() -> Iterator[str]:
    """Every word of every caption, also with a capital letter, in a fixed order; some come more than once."""
    texts = ["a an two and on background", *BACKGROUNDS]
    for label in THINGS:
        for name in names_of(label):
            texts += [name, plural(name) or ""]
    texts += [phrase for motion in MOTIONS.values() for phrase in motion.phrases]
    for text in texts:
        for word in text.split():
            yield word
            yield word[0].upper() + word[1:]


CAN_CROSS_ITSELF = tuple(i for i, label in enumerate(THINGS) if any(plural(name) for name in names_of(label)))
"""Things with a plural, for "two stars crossing"."""
