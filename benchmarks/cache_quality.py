"""Time that step caches save, and their cost: PSNR and SSIM to the uncached picture, for each setting.

    python -m benchmarks.cache_quality --prompts 100
    python -m benchmarks.cache_quality --prompts 16 --model demo-video --out out/video_cache_quality

One picture or video at a time, on an embedded model (or `--model FOLDER` with `--prompt-file`), 50 steps with guidance.
A video counts as one picture. Times are those of the denoising steps. Each cached picture is followed by the uncached
one on the same engine, and the median of the ratios counts, so that a drifting machine affects both equally. TeaCache's
polynomial is measured first, as in `vllm-omni calibrate-teacache`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tools.demo_model.vocabulary import BACKGROUNDS, THINGS
from tools.demo_video.evaluate import wanted_clips
from tqdm import tqdm

from vllm_omni import Omni
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.entrypoints.cli import calibrate
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt

Config = Mapping[str, Any]

CACHE_DIT: dict[str, Config] = {
    "0.08, warm-up 8, no limit": {
        "residual_diff_threshold": 0.08,
        "max_warmup_steps": 8,
        "max_continuous_cached_steps": -1,
    },
    "0.12, warm-up 8, no limit": {
        "residual_diff_threshold": 0.12,
        "max_warmup_steps": 8,
        "max_continuous_cached_steps": -1,
    },
    "0.12": {"residual_diff_threshold": 0.12},
    "0.24 (default)": {},
    "0.24, Taylor 1": {"enable_taylorseer": True, "taylorseer_order": 1},
    "0.24, Taylor 2": {"enable_taylorseer": True, "taylorseer_order": 2},
    "0.24, Bn 1": {"Bn_compute_blocks": 1},
    "0.4, at most 6 in a row": {"residual_diff_threshold": 0.4, "max_continuous_cached_steps": 6},
    "mask medium, Taylor 1": {"scm_steps_mask_policy": "medium", "enable_taylorseer": True},
    "mask fast, static, Taylor 1": {
        "scm_steps_mask_policy": "fast",
        "steps_computation_policy": "static",
        "enable_taylorseer": True,
    },
}
TEA_CACHE: dict[str, Config] = {
    f"{threshold}": {"rel_l1_thresh": threshold} for threshold in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)
}
NUM_CALIBRATION_PROMPTS = 8
REFERENCE_EVERY = 2
HIGHEST_PSNR = 100.0
"""PSNR in decibels that stands for equal pictures."""


@dataclass
class Row:
    """Results of one setting, over all prompts."""

    cache: str
    setting: str
    config: Config
    cached_steps: float
    """Mean number of cached steps per picture."""
    saved: float
    """Fraction of the denoising time that is saved; median over pictures."""
    psnr_mean: float
    psnr_min: float
    ssim_mean: float


def prompts_of(model: str, count: int) -> list[str]:
    """Prompts from the vocabulary of an embedded model."""
    return [wanted.prompt for wanted in wanted_clips(0, count)] if model == "demo-video" else demo_prompts(count)


def demo_prompts(count: int) -> list[str]:
    """Prompts with things from the whole vocabulary, every second one on a coloured background."""
    colours = list(BACKGROUNDS)
    things = [THINGS[i * len(THINGS) // count % len(THINGS)] for i in range(count)]
    return [t if i % 2 == 0 else f"{t} on a {colours[i % len(colours)]} background" for i, t in enumerate(things)]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures, in decibels."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return HIGHEST_PSNR if error == 0 else min(HIGHEST_PSNR, float(10 * np.log10(255.0**2 / error)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of two uint8 pictures or videos, [..., height, width, 3].

    The mean over frames and channels, with a Gaussian window of 11.
    """
    offsets = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    x, y = (torch.from_numpy(p.astype(np.float64)).movedim(-1, 0).flatten(0, -3)[:, None] for p in (a, b))
    mean_x, mean_y = F.conv2d(x, window), F.conv2d(y, window)
    var_x, var_y = F.conv2d(x * x, window) - mean_x**2, F.conv2d(y * y, window) - mean_y**2
    covariance = F.conv2d(x * y, window) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


class Drawer:
    """Engine that draws all prompts, one at a time."""

    def __init__(self, args: argparse.Namespace, prompts: Sequence[str]) -> None:
        self._model = args.model
        self._prompts = prompts
        self._params = params_of(args, output_type="np")

    def references(self) -> list[np.ndarray]:
        with self._omni("none", {}) as omni:
            return [self._draw(omni, i, cached=False)[0] for i in tqdm(range(len(self._prompts)), desc="uncached")]

    def measure(self, cache: str, setting: str, config: Config, references: Sequence[np.ndarray]) -> Row:
        pictures, cached_steps, ratios = [], [], []
        with self._omni(cache, config) as omni:
            self._draw(omni, 0, cached=True)  # warm-up, not counted
            for i in tqdm(range(len(self._prompts)), desc=f"{cache} {setting}"):
                picture, timing = self._draw(omni, i, cached=True)
                pictures.append(picture)
                cached_steps.append(timing["cached_steps"])
                if i % REFERENCE_EVERY == 0:
                    ratios.append(timing["denoise"] / self._draw(omni, i, cached=False)[1]["denoise"])
        decibels = [psnr(a, b) for a, b in zip(pictures, references, strict=True)]
        return Row(
            cache=cache,
            setting=setting,
            config=config,
            cached_steps=statistics.mean(cached_steps),
            saved=1 - statistics.median(ratios),
            psnr_mean=statistics.mean(decibels),
            psnr_min=min(decibels),
            ssim_mean=statistics.mean(ssim(a, b) for a, b in zip(pictures, references, strict=True)),
        )

    def _omni(self, cache: str, config: Config) -> Omni:
        settings: dict[str, Any] = {"cache_backend": cache, "cache_config": config}
        return Omni(model=self._model, distributed_executor_backend="uni", progress_bar=False, **settings)

    def _draw(self, omni: Omni, number: int, *, cached: bool) -> tuple[np.ndarray, dict[str, float]]:
        prompt = OmniPrompt(self._prompts[number], negative_prompt="")
        params = replace(self._params, seed=number, cache=None if cached else False)
        (output,) = omni.generate(prompt, params)
        return output.images[0], output.timings


def params_of(args: argparse.Namespace, **values: Any) -> OmniDiffusionSamplingParams:
    """Parameters with guidance under the name that the model has for it."""
    guidance = load_model_info(args.model).guidance.parameter
    return OmniDiffusionSamplingParams(num_inference_steps=args.steps, **{guidance: args.guidance_scale}, **values)


def measure_polynomial(args: argparse.Namespace, prompts: Sequence[str]) -> list[float]:
    """TeaCache's coefficients for the model, measured on these prompts; any others would do as well."""
    out = args.out.with_name(args.out.name + "_teacache")
    params = params_of(args, seed=1_000_000)
    config = calibrate.calibration_config(model=args.model)
    calibrate.calibrate(calibrate.CalibrateArgs(config, tuple(prompts[:NUM_CALIBRATION_PROMPTS]), params, out))
    coefficients: list[float] = json.loads(out.with_suffix(".json").read_text())["coefficients"]
    return coefficients


def print_table(rows: Sequence[Row], num_steps: int) -> None:
    print(f"| cache | setting | steps cached of {num_steps} | time saved | PSNR mean / min | SSIM |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.cache} | {row.setting} | {row.cached_steps:.1f} | {row.saved:.0%} "
            f"| {row.psnr_mean:.1f} / {row.psnr_min:.1f} dB | {row.ssim_mean:.4f} |"
        )


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Plot time saved against PSNR; up and right is better, bars reach down to the worst picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    for cache, colour in (("cache_dit", "tab:blue"), ("tea_cache", "tab:orange")):
        own = sorted((row for row in rows if row.cache == cache), key=lambda row: row.saved)
        saved = [100 * row.saved for row in own]
        means = [row.psnr_mean for row in own]
        below = [row.psnr_mean - row.psnr_min for row in own]
        axes.errorbar(
            saved, means, [below, [0] * len(own)], fmt="o", elinewidth=0.6, capsize=2, color=colour, label=cache
        )
        for row, x, y in zip(own, saved, means):
            axes.annotate(row.setting, (x, y), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="denoising time saved, %", ylabel="PSNR to the uncached picture, dB", title=title)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=int, default=100, help="how many")
    parser.add_argument("--prompt-file", type=Path, help="one a line; default: the embedded model's words")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=Path("out/cache_quality"), help="stem of the .json and the .png")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.prompt_file is None:
        prompts = prompts_of(args.model, args.prompts)
    else:
        prompts = args.prompt_file.read_text().splitlines()[: args.prompts]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    coefficients = measure_polynomial(args, prompts)
    drawer = Drawer(args, prompts)
    references = drawer.references()
    settings = [("cache_dit", name, config) for name, config in CACHE_DIT.items()]
    settings += [("tea_cache", name, {**config, "coefficients": coefficients}) for name, config in TEA_CACHE.items()]
    rows = [drawer.measure(*setting, references) for setting in settings]
    print_table(rows, args.steps)
    report = {"model": args.model, "num_prompts": len(prompts), "steps": args.steps, "rows": [asdict(r) for r in rows]}
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
    plot(rows, f"{args.model}, {args.steps} steps, {len(prompts)} prompts", args.out.with_suffix(".png"))
    print(f"wrote {args.out}.json and {args.out}.png")


if __name__ == "__main__":
    main()
