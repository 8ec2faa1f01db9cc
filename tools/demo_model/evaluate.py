"""Measure a saved demo model; write the numbers and a grid of pictures.

python -m tools.demo_model.evaluate --model src/vllm_omni/demo_model --out .demo-data/evaluation --device cuda
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import drawings, judge, scenes
from .sampling import generate, grid, load_pipeline
from .scenes import Sprites
from .vocabulary import (
    BACKGROUNDS,
    NATIVE,
    SIDE_BY_SIDE,
    SINGLE,
    SIZES,
    STACKED,
    THINGS,
    add_article,
    parse_size,
)

PROMPTS = 100


def as_tensor(pictures: list[np.ndarray], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float() / 255


def chosen(rng: np.random.Generator, count: int) -> list[int]:
    """Things for `count` prompts, all equally often."""
    order = [int(i) for _ in range(-(-count // len(THINGS))) for i in rng.permutation(len(THINGS))]
    return order[:count]


def share(right: list[bool]) -> float:
    return round(100 * sum(right) / len(right), 1)


def with_article(thing: int) -> str:
    return add_article(THINGS[thing], THINGS[thing])


class Evaluation:
    def __init__(self, model: Path, sprites: Sprites, device: torch.device, prompts: int) -> None:
        self.pipeline = load_pipeline(model, device)
        self.sprites, self.device, self.prompts = sprites, device, prompts

    def make(self, texts: list[str], size: tuple[int, int], seed: int, **settings: Any) -> torch.Tensor:
        return as_tensor(generate(self.pipeline, texts, size, seed, **settings), self.device)

    def labels(self, size: tuple[int, int], seed: int, **settings: Any) -> dict[str, Any]:
        """Score of plain labels: is the best fitting thing the prompted one, and is the background white?"""
        wanted = chosen(np.random.default_rng(seed), self.prompts)
        pictures = self.make([THINGS[i] for i in wanted], size, seed, **settings)
        found = judge.best_fit(pictures, self.sprites, pair=False).things.tolist()
        white = [name == "white" for name in judge.nearest_background(judge.border_shade(pictures))]
        wrong = [f"{THINGS[a]} -> {THINGS[b]}" for a, b in zip(wanted, found, strict=True) if a != b]
        return {
            "right": share([a == b for a, b in zip(wanted, found, strict=True)]),
            "white": share(white),
            "wrong": wrong,
        }

    def backgrounds(self, size: tuple[int, int], seed: int) -> dict[str, Any]:
        """Score of "a THING on a COLOUR background": do thing and background fit?"""
        wanted = chosen(np.random.default_rng(seed), self.prompts)
        colours = [list(BACKGROUNDS)[i % len(BACKGROUNDS)] for i in range(self.prompts)]
        texts = [f"{with_article(i)} on a {c} background" for i, c in zip(wanted, colours, strict=True)]
        pictures = self.make([t.replace("a orange", "an orange") for t in texts], size, seed)
        names = judge.nearest_background(judge.border_shade(pictures))
        found = judge.best_fit(pictures, self.sprites, pair=False).things.tolist()
        wrong = [f"{a} -> {b}" for a, b in zip(colours, names, strict=True) if a != b]
        return {
            "background": share([a == b for a, b in zip(colours, names, strict=True)]),
            "thing": share([a == b for a, b in zip(wanted, found, strict=True)]),
            "wrong_backgrounds": wrong,
        }

    def pairs(self, size: tuple[int, int], seed: int) -> dict[str, Any]:
        """Score of two things: is each the best fitting one in its half of the picture?"""
        rng, half = np.random.default_rng(seed), self.prompts // 2
        wanted = [[int(i) for i in rng.choice(len(THINGS), 2, replace=False)] for _ in range(2 * half)]
        words = ["left of", "right of"] * (half // 2) + ["above", "below"] * (half // 2)
        texts = []
        for pair, word in zip(wanted, words, strict=True):
            first, second = pair[::-1] if word in ("right of", "below") else pair
            texts.append(f"{with_article(first)} {word} {with_article(second)}")
        result: dict[str, Any] = {}
        for stacked, pictures in enumerate(self.make(texts, size, seed).split(half)):
            cells = judge.halves(pictures, bool(stacked))
            found = torch.stack([judge.best_fit(cell, self.sprites, pair=True).things for cell in cells], 1).cpu()
            hits = found == torch.tensor(wanted[stacked * half :][:half])
            name = ("left/right", "above/below")[stacked]
            result[name] = {"both": share(hits.all(1).tolist()), "each": share(hits.flatten().tolist())}
        return result

    def variety(self, size: tuple[int, int], seeds: int = 8) -> dict[str, float]:
        """Differences between seeds for one prompt: spread of the found place, scale and shade."""
        spreads, difference = [], []
        for thing in range(0, len(THINGS), len(THINGS) // 10):
            texts = [f"{with_article(thing)} on a blue background"] * seeds
            pictures = self.make(texts, size, seed=1000)
            found = judge.best_fit(pictures, self.sprites, pair=False)
            shade = judge.border_shade(pictures).mean(1)
            spreads.append([v.float().std().item() for v in (found.x, found.y, found.scale, shade)])
            difference.append((pictures[1:] - pictures[:-1]).abs().mean().item())
        names = ("x", "y", "scale", "shade")
        values = {name: round(float(v), 3) for name, v in zip(names, np.mean(spreads, 0), strict=True)}
        return values | {"mean_difference": round(float(np.mean(difference)), 3)}


def ceiling(sprites: Sprites, size: tuple[int, int], seed: int, vae: Any = None) -> dict[str, float]:
    """Scores of true scenes, or with an autoencoder of their reconstructions: the upper limit for the model."""
    result = {}
    plan = scenes.plan_batch(seed, 0, 4 * PROMPTS, sizes=(size,))
    pictures = scenes.draw(plan.frame, [x.to(sprites.full.device) for x in plan.tensors], sprites)
    if vae is not None:
        with torch.no_grad():
            pictures = vae.decode(vae.encode(pictures.unsqueeze(2)).latent_dist.mode()).sample[:, :, 0].clamp(-1, 1)
    groups = (pictures / 2 + 0.5).split(plan.frame.counts)
    wanted = plan.things.split(plan.frame.counts)
    for layout, name in ((SINGLE, "single"), (SIDE_BY_SIDE, "side by side"), (STACKED, "stacked")):
        cells = [groups[layout]] if layout == SINGLE else judge.halves(groups[layout], layout == STACKED)
        found = torch.stack([judge.best_fit(c, sprites, pair=layout != SINGLE).things for c in cells], 1).cpu()
        result[name] = share((found == wanted[layout][:, : len(cells)]).all(1).tolist())
    backgrounds = judge.nearest_background(judge.border_shade(pictures / 2 + 0.5))
    result["background"] = share(
        [list(BACKGROUNDS)[i] == name for i, name in zip(plan.backgrounds, backgrounds, strict=True)]
    )
    return result


def measure(evaluation: Evaluation, sizes: list[tuple[int, int]], pairs: bool) -> dict[str, Any]:
    """Numbers of the model card; `pairs`: include pictures of two things."""
    started = time.time()
    numbers: dict[str, Any] = {"prompts": evaluation.prompts, "native": "x".join(map(str, NATIVE))}
    numbers["true scenes"] = ceiling(evaluation.sprites, NATIVE, seed=7)
    numbers["reconstructions"] = ceiling(evaluation.sprites, NATIVE, seed=7, vae=evaluation.pipeline.vae)
    numbers["labels"], numbers["pairs"] = {}, {}
    for number, size in enumerate(sizes):
        name = f"{size[0]}x{size[1]}"
        numbers["labels"][name] = evaluation.labels(size, seed=10 + number)
        if pairs:
            numbers["pairs"][name] = evaluation.pairs(size, seed=50 + number)
        print(name, json.dumps([numbers["labels"][name], numbers["pairs"].get(name)]), flush=True)
    squares = [size for size in sizes if size in ((64, 64), (96, 96), (128, 128))]
    numbers["backgrounds"] = {f"{h}x{w}": evaluation.backgrounds((h, w), seed=80) for h, w in squares}
    numbers["steps"] = {str(n): evaluation.labels(NATIVE, seed=90, steps=n)["right"] for n in (4, 8, 20, 50)}
    numbers["without guidance"] = evaluation.labels(NATIVE, seed=90, guidance=1.0)["right"]
    numbers["variety"] = evaluation.variety(NATIVE)
    numbers["seconds"] = round(time.time() - started)
    return numbers


def show(pipeline: Any, sizes: list[tuple[int, int]], pairs: bool) -> Any:
    """Grid for the model card: single things, backgrounds, pairs, one prompt with eight seeds, other sizes."""
    rows: list[tuple[str, tuple[int, int], int]] = []
    singles = "red apple;a cool face;a panda;pizza;a rocket;guitar;a police car;books"
    coloured = (
        "panda,pink;pizza,purple;hamburger,blue;strawberry,black;frog,yellow;unicorn,green;whale,orange;rose,white"
    )
    rows += [(text, NATIVE, 1) for text in singles.split(";")]
    for item in coloured.split(";"):
        name, colour = item.split(",")
        rows.append((f"a {name} on a{'n' * (colour == 'orange')} {colour} background", NATIVE, 2))
    two_things = (
        "a red apple left of a blue heart;a cat right of a soccer ball;a rocket above a full moon;"
        "a penguin below an umbrella;"
        "a taxi left of a tree on a pink background;an owl above a gift on a blue background;"
        "a robot right of a guitar on a yellow background;a bee above a sunflower on a green background"
    )
    rows += [(text, NATIVE, 3) for text in two_things.split(";") if pairs]
    rows += [("a sailboat on a blue background", NATIVE, seed) for seed in range(8)]
    shown = ((64, 128), (128, 64), (128, 128), (80, 112), (112, 80))
    rows += [("a strawberry on a black background", size, 4) for size in shown if size in sizes]
    if pairs:
        rows += [("a lion left of a bus", (64, 128), 4), ("a lion above a bus", (128, 64), 4)]
    pictures = [generate(pipeline, [text], size, seed)[0] for text, size, seed in rows]
    return grid(pictures, [text for text, _, _ in rows], columns=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=Path("src/vllm_omni/demo_model"))
    parser.add_argument("--drawings", type=Path, default=Path(".demo-data/drawings.npz"))
    parser.add_argument("--out", type=Path, default=Path(".demo-data/evaluation"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--sizes", nargs="*", help="such as 64x64 96x128; all by default")
    parser.add_argument("--no-pairs", action="store_true", help="for models that draw one thing only")
    args = parser.parse_args()
    device = torch.device(args.device)
    sprites = Sprites.from_rgba(drawings.load(args.drawings), device)
    evaluation = Evaluation(args.model, sprites, device, args.prompts)
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = [parse_size(s) for s in args.sizes] if args.sizes else list(SIZES)
    pairs = not args.no_pairs
    show(evaluation.pipeline, sizes, pairs).save(args.out / "grid.png")
    numbers = measure(evaluation, sizes, pairs)
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(json.dumps({k: v for k, v in numbers.items() if k not in ("labels", "pairs")}), flush=True)


if __name__ == "__main__":
    main()
