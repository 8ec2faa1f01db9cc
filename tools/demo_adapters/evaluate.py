"""Measure the demo model's adapters; write the numbers and a sheet of pictures.

python -m tools.demo_adapters.evaluate --out .demo-data/adapters --device cuda
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..demo_model import judge
from ..demo_model.evaluate import PROMPTS, Evaluation, chosen, share
from ..demo_model.sampling import generate, grid
from ..demo_model.scenes import Sprites
from ..demo_model.vocabulary import BACKGROUNDS, NATIVE, THINGS, add_article, parse_size
from . import distil, night
from .things import LABELS, LIGHTHOUSE, load_sprites

SIZES = (NATIVE, (96, 96), (128, 128))
NAMES = ("night", "lighthouse", "fast")
FAST: dict[str, Any] = {"steps": distil.STEPS, "guidance": 1.0}
SHOWN = ("a lighthouse", "red apple", "a panda on a pink background", "a taxi", "a lighthouse left of a full moon")
ROWS: tuple[tuple[str, dict[str, float], dict[str, Any]], ...] = (
    ("no adapter", {}, {}),
    ("night, 0.5", {"night": 0.5}, {}),
    ("night", {"night": 1.0}, {}),
    ("lighthouse, 0.5", {"lighthouse": 0.5}, {}),
    ("lighthouse", {"lighthouse": 1.0}, {}),
    ("both, 0.5", {"night": 0.5, "lighthouse": 0.5}, {}),
    ("both", {"night": 1.0, "lighthouse": 1.0}, {}),
    ("no adapter, 4 steps, no guidance", {}, FAST),
    ("fast", {"fast": 1.0}, FAST),
)


def prompts_of(things: Sequence[int]) -> list[str]:
    """Prompts for these things, every third with a background."""
    texts = []
    for number, thing in enumerate(things):
        label = LABELS[thing]
        colour = list(BACKGROUNDS)[number // 3 % len(BACKGROUNDS)]
        forms = (label, add_article(label, label))
        on_background = f"{forms[1]} on {add_article(colour, colour)} background"
        texts.append((*forms, on_background)[number % 3])
    return texts


def psnr(pictures: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean PSNR of pictures [n, 3, height, width] in [0, 1], in dB."""
    errors = (pictures - wanted).square().mean((1, 2, 3)).clamp_min(1e-10)
    return round(float((-10 * torch.log10(errors)).mean()), 2)


class AdapterEvaluation(Evaluation):
    """Evaluation of the model with some of its adapters, by diffusers and peft."""

    def __init__(self, model: Path, adapters: Path, sprites: Sprites, device: torch.device, prompts: int) -> None:
        super().__init__(model, sprites, device, prompts)
        self.glowing = night.with_glow(sprites)
        for name in NAMES:
            self.pipeline.load_lora_weights(adapters / name, adapter_name=name)

    def use(self, scales: dict[str, float]) -> None:
        """Compute with these adapters and no others."""
        self.pipeline.enable_lora() if scales else self.pipeline.disable_lora()
        if scales:
            self.pipeline.set_adapters(list(scales), list(scales.values()))

    def right(self, pictures: torch.Tensor, wanted: Sequence[int], sprites: Sprites) -> float:
        found = judge.best_fit(pictures, sprites, pair=False).things.tolist()
        return share([a == b for a, b in zip(wanted, found, strict=True)])

    def night(self, size: tuple[int, int], seed: int) -> dict[str, float]:
        """Share of right things and of dark blue backgrounds, in percent."""
        wanted = chosen(np.random.default_rng(seed), self.prompts)
        self.use({"night": 1.0})
        pictures = self.make(prompts_of(wanted), size, seed)
        dark = share(night.is_dark_blue(judge.border_shade(pictures)))
        return {"right": self.right(pictures, wanted, self.glowing), "dark": dark}

    def lighthouse(self, size: tuple[int, int], seed: int) -> dict[str, float]:
        """Share of lighthouses that are right at each scale of the adapter, and of other things at full scale."""
        texts = prompts_of([LIGHTHOUSE] * self.prompts)
        result = {}
        for scale in (0.0, 0.5, 1.0):
            self.use({"lighthouse": scale} if scale else {})
            pictures = self.make(texts, size, seed)
            result[f"right at {scale}"] = self.right(pictures, [LIGHTHOUSE] * self.prompts, self.sprites)
        wanted = chosen(np.random.default_rng(seed), self.prompts)
        result["other things"] = self.right(self.make(prompts_of(wanted), size, seed), wanted, self.sprites)
        return result

    def both(self, size: tuple[int, int], seed: int) -> dict[str, float]:
        """Share of right lighthouses, and of dark blue backgrounds at full scale, with night and lighthouse."""
        texts, wanted = prompts_of([LIGHTHOUSE] * self.prompts), [LIGHTHOUSE] * self.prompts
        self.use({"night": 0.5, "lighthouse": 0.5})
        result = {"right at 0.5": self.right(self.make(texts, size, seed), wanted, self.sprites)}
        self.use({"night": 1.0, "lighthouse": 1.0})
        pictures = self.make(texts, size, seed)
        result["right at 1.0"] = self.right(pictures, wanted, self.glowing)
        return result | {"dark at 1.0": share(night.is_dark_blue(judge.border_shade(pictures)))}

    def fast(self, size: tuple[int, int], seed: int) -> dict[str, float]:
        """Share of right things, and the distance to the pictures of 20 steps with guidance, in dB."""
        wanted = chosen(np.random.default_rng(seed), self.prompts)
        texts = prompts_of(wanted)
        self.use({})
        slow, plain = self.make(texts, size, seed), self.make(texts, size, seed, **FAST)
        self.use({"fast": 1.0})
        pictures = self.make(texts, size, seed, **FAST)
        return {
            "right": self.right(pictures, wanted, self.sprites),
            "right without": self.right(plain, wanted, self.sprites),
            "psnr": psnr(pictures, slow),
            "psnr without": psnr(plain, slow),
        }

    def sheet(self, size: tuple[int, int], seed: int) -> Image.Image:
        """Rows with different adapters; each column has one prompt and one noise."""
        pictures, captions = [], []
        for name, scales, settings in ROWS:
            self.use(scales)
            pictures += generate(self.pipeline, SHOWN, size, seed, **settings)
            captions += [f"{name}: {text}" for text in SHOWN]
        return grid(pictures, captions, columns=len(SHOWN))


def measure(evaluation: AdapterEvaluation, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Numbers of the adapters' cards."""
    numbers: dict[str, Any] = {"prompts": evaluation.prompts, "things": len(THINGS)}
    for number, size in enumerate(sizes):
        name = f"{size[0]}x{size[1]}"
        for part in (evaluation.night, evaluation.lighthouse, evaluation.both, evaluation.fast):
            numbers.setdefault(part.__name__, {})[name] = part(size, 10 + number)
            print(name, part.__name__, json.dumps(numbers[part.__name__][name]), flush=True)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=Path("src/vllm_omni/demo_model"))
    parser.add_argument("--adapters", type=Path, default=Path("src/vllm_omni/demo_model/adapters"))
    parser.add_argument("--drawings", type=Path, default=Path(".demo-data/drawings.npz"))
    parser.add_argument("--out", type=Path, default=Path(".demo-data/adapters"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--sizes", nargs="*", help="such as 64x64 96x128; three squares by default")
    args = parser.parse_args()
    device, started = torch.device(args.device), time.time()
    sprites = load_sprites(args.drawings, device)
    evaluation = AdapterEvaluation(args.model, args.adapters, sprites, device, args.prompts)
    args.out.mkdir(parents=True, exist_ok=True)
    evaluation.sheet(NATIVE, seed=0).save(args.out / "sheet.png")
    numbers = measure(evaluation, [parse_size(size) for size in args.sizes] if args.sizes else SIZES)
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"{time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
