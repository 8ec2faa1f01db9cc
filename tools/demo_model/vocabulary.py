"""Vocabulary of the demo model: things, backgrounds, sizes, and captions of scenes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

# emojibase labels, lower case; the order is the order of the drawings file
_THINGS = """
    airplane; alarm clock; alien; ambulance; american football; anchor; angry face; artist palette; automobile;
    avocado; backpack; balloon; banana; baseball; basketball; bear; beer mug; bell; bicycle; bird; birthday cake;
    black heart; blue heart; books; bread; broccoli; broken heart; bus; butterfly; cactus; camera; carrot; castle;
    cat face; cherries; chicken; christmas tree; cloud; clown face; cookie; cow face; crescent moon; crown;
    crying face; deciduous tree; dog face; dolphin; doughnut; droplet; drum; duck; egg; elephant; envelope; fire;
    fire engine; fish; four leaf clover; fox; french fries; frog; full moon; gem stone; ghost; glasses; grapes;
    green apple; green heart; grinning face; guitar; hamburger; hammer; helicopter; high voltage; high-heeled shoe;
    honeybee; hot beverage; hot dog; house; ice cream; jack-o-lantern; key; koala; lady beetle; laptop; lemon;
    light bulb; lion; locked; locomotive; magnifying glass tilted left; maple leaf; mobile phone; money bag;
    monkey face; motorcycle; mouse face; mushroom; octopus; open book; orange heart; owl; palm tree; panda; peach;
    pear; pencil; penguin; pig face; pile of poo; pineapple; pizza; police car; purple heart; rabbit face; rainbow;
    red apple; red heart; robot; rocket; rose; sailboat; scissors; skull; sleeping face;
    smiling face with heart-eyes; smiling face with sunglasses; snail; snake; snowflake; snowman; soccer ball;
    socks; spouting whale; star; strawberry; sun; sunflower; t-shirt; taxi; television; tennis; tent; tiger face;
    tomato; top hat; trophy; tropical fish; trumpet; tulip; turtle; umbrella; unicorn; video game; violin; volcano;
    watermelon; wine glass; wrapped gift; yellow heart
"""
THINGS: tuple[str, ...] = tuple(" ".join(label.split()) for label in _THINGS.split(";"))

# shorter or more usual names, used in half of the captions
OTHER_NAMES: dict[str, str] = {
    "automobile": "car",
    "cat face": "cat",
    "cow face": "cow",
    "deciduous tree": "tree",
    "dog face": "dog",
    "doughnut": "donut",
    "fire engine": "fire truck",
    "four leaf clover": "clover",
    "gem stone": "diamond",
    "grinning face": "happy face",
    "crying face": "sad face",
    "hamburger": "burger",
    "high voltage": "lightning bolt",
    "high-heeled shoe": "shoe",
    "honeybee": "bee",
    "hot beverage": "cup of coffee",
    "jack-o-lantern": "pumpkin",
    "lady beetle": "ladybug",
    "locked": "padlock",
    "locomotive": "train",
    "magnifying glass tilted left": "magnifying glass",
    "mobile phone": "phone",
    "monkey face": "monkey",
    "mouse face": "mouse",
    "pig face": "pig",
    "pile of poo": "poo",
    "rabbit face": "rabbit",
    "crescent moon": "moon",
    "smiling face with heart-eyes": "face in love",
    "smiling face with sunglasses": "cool face",
    "spouting whale": "whale",
    "television": "tv",
    "tennis": "tennis racket",
    "tiger face": "tiger",
    "video game": "game controller",
    "wrapped gift": "gift",
}
_NO_ARTICLE = (
    "books, bread, broccoli, cherries, fire, french fries, glasses, grapes, high voltage, locked, scissors, socks"
)
NO_ARTICLE = frozenset([*_NO_ARTICLE.split(", "), "tennis"])

# name -> full-brightness RGB; every scene draws its own shade between the two brightness factors
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (44, 44, 44),
    "blue": (96, 156, 250),
    "green": (112, 208, 124),
    "pink": (255, 176, 206),
    "orange": (255, 172, 84),
    "purple": (166, 124, 226),
    "yellow": (255, 232, 110),
}
DARKEST_SHADE: dict[str, float] = {"white": 0.93, "black": 0.3}
USUAL_DARKEST_SHADE = 0.78

SIDES: tuple[int, ...] = (64, 80, 96, 112, 128)
SIZES: tuple[tuple[int, int], ...] = tuple((h, w) for h in SIDES for w in SIDES)  # (height, width)
NATIVE = (64, 64)
TRAINING_SIZES = (*SIZES, *[NATIVE] * 5)  # the native size is drawn six times as often as each other

SINGLE, SIDE_BY_SIDE, STACKED = range(3)


def parse_size(text: str) -> tuple[int, int]:
    """Parse a size in the form HEIGHTxWIDTH."""
    height, width = map(int, text.split("x"))
    return height, width


@dataclass(frozen=True)
class Scene:
    """One thing, or two things in the two halves of the picture, on a background."""

    things: tuple[int, ...]  # left before right, upper before lower
    layout: int
    background: str

    def showing(self, thing: int, rng: np.random.Generator) -> Scene:
        """Same scene with this thing in the place of one of its things, unless it shows the thing already."""
        if thing in self.things:
            return self
        place = int(rng.integers(len(self.things)))
        return replace(self, things=tuple(thing if i == place else other for i, other in enumerate(self.things)))


def add_article(name: str, label: str) -> str:
    """Name with its article, if English needs one."""
    if label in NO_ARTICLE and name == label:
        return name
    return ("an " if name[0] in "aeiou" and not name.startswith("uni") else "a ") + name


def name_of(
    thing: int,
    rng: np.random.Generator,
    article: float,
    other_names: Mapping[str, str] = OTHER_NAMES,
    things: Sequence[str] = THINGS,
) -> str:
    label = things[thing]
    name = other_names[label] if label in other_names and rng.random() < 0.5 else label
    return add_article(name, label) if rng.random() < article else name


def on_background(text: str, background: str, rng: np.random.Generator) -> str:
    """Text with the background's name; a white background is often left out."""
    if background == "white" and rng.random() < 0.75:
        return text
    return f"{text} on {add_article(background, background)} background"


def caption(scene: Scene, rng: np.random.Generator, things: Sequence[str] = THINGS) -> str:
    """Random sentence that describes the scene. `things`: labels of the scene's things by number."""
    if scene.layout == SINGLE:
        text = name_of(scene.things[0], rng, article=0.6, things=things)
    else:
        words = ("left of", "right of") if scene.layout == SIDE_BY_SIDE else ("above", "below")
        turned = int(rng.random() < 0.5)  # "A right of B" shows B in the first half
        first, second = scene.things[::-1] if turned else scene.things
        article = float(rng.random() < 0.75)
        names = [name_of(thing, rng, article, things=things) for thing in (first, second)]
        text = f"{names[0]} {words[turned]} {names[1]}"
    return on_background(text, scene.background, rng)


def draw_scene(layout: int, rng: np.random.Generator, count: int = len(THINGS)) -> Scene:
    """Random scene of this layout with some of `count` things; two things are always different ones."""
    things = rng.choice(count, size=1 if layout == SINGLE else 2, replace=False)
    names = list(BACKGROUNDS)
    background = "white" if rng.random() < 0.35 else names[rng.integers(len(names))]
    return Scene(tuple(int(t) for t in things), layout, background)
