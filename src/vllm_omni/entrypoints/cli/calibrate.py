"""`vllm-omni calibrate-teacache MODEL`: measure the polynomial that TeaCache needs for a model of a packed family."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_omni.diffusion.catalog.folder_files import TEA_CACHE_FILE
from vllm_omni.diffusion.catalog.hub import HubAccess
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.entrypoints.cli import flag_types
from vllm_omni.entrypoints.cli.args import FlagGroup, add_dtype_flag, add_hub_flags, make_settings
from vllm_omni.entrypoints.cli.commands import CALIBRATE
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt

if TYPE_CHECKING:
    from PIL import Image

    from vllm_omni.diffusion.catalog.model_info import ModelInfo
    from vllm_omni.diffusion.compute.cache.calibration import Change

# Short: an embedded model accepts 32 tokens, and reads unknown words letter by letter.
DEFAULT_PROMPTS = (
    "a red apple",
    "a panda on a pink background",
    "a mountain lake at sunrise",
    "an old fisherman, oil painting",
    "a night market with neon signs",
    "a drawing of a small house",
    "a bowl of ramen from above",
    "a poster that says HELLO",
)


@dataclass(frozen=True)
class CalibrateArgs:
    config: OmniDiffusionConfig
    """Has a cache backend: see `calibration_config`."""
    prompts: tuple[str, ...]
    params: OmniDiffusionSamplingParams
    out: Path
    images: tuple[Path, ...] = ()
    """Pictures that every prompt edits."""


def calibration_config(**settings: Any) -> OmniDiffusionConfig:
    """Config with a cache backend, without which no request takes part in caching; its coefficients are not used."""
    cache_config = {"coefficients": (1.0, 0.0)}
    return make_settings(OmniDiffusionConfig, settings | {"cache_backend": "tea_cache", "cache_config": cache_config})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(re.sub(r"^argument (\S+): ", r"\1 ", message))


def parse_args(argv: Sequence[str]) -> CalibrateArgs:
    """Parse the words after the command's name. Raises ConfigError."""
    parser = _Parser(prog=f"vllm-omni {CALIBRATE}", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub name, `demo` or `demo-video`")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt per line; none: built-in prompts")
    images_help = "for an editing model: the pictures that every prompt edits"
    parser.add_argument("--images", type=Path, nargs="+", default=[], metavar="FILE", help=images_help)
    parser.add_argument("--size", type=flag_types.picture_size, metavar="WxH", help="pixels; none: the model's default")
    frames_help = "frames of a video; none: the model's default"
    parser.add_argument("--num-frames", type=flag_types.integer(1), help=frames_help)
    parser.add_argument("--num-inference-steps", type=flag_types.integer(3), help="steps; none: the model's default")
    guidance_help = "scale of guidance, under the name that the model's requests have for it; none: the model's default"
    for flag in ("--true-cfg-scale", "--guidance-scale"):
        parser.add_argument(flag, type=float, help=guidance_help)
    parser.add_argument("--seed", type=flag_types.integer(0), default=0, help="seed; prompt i has seed + i")
    parser.add_argument("--out", type=Path, default=Path("teacache"), help="path of the .json and .png, without suffix")
    engine = FlagGroup(parser, OmniDiffusionConfig)
    add_dtype_flag(engine)
    add_hub_flags(engine)
    args = parser.parse_args(list(argv))
    given = vars(args) | dict(zip(("width", "height"), args.size or ()))
    prompts = DEFAULT_PROMPTS if args.prompts is None else _read_prompts(args.prompts)
    params = make_settings(OmniDiffusionSamplingParams, given)
    return CalibrateArgs(calibration_config(**given), prompts, params, args.out, tuple(args.images))


def _read_prompts(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: cannot read {path}: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConfigError(f"--prompts takes a file with a prompt a line, got an empty one: {path}")
    return prompts


def _read_images(paths: Sequence[Path], info: ModelInfo) -> tuple[Image.Image, ...]:
    from PIL import Image

    if info.image_input is None and paths:
        raise ConfigError("--images is for models that edit pictures, which this one does not")
    if info.image_input is not None and len(paths) < (least := info.image_input.min_images):
        raise ConfigError(f"--images takes what the prompts edit, at least {least} for this model, got {len(paths)}")
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(image.copy())
        except (OSError, Image.DecompressionBombError) as error:
            raise ConfigError(f"--images: cannot read {path}: {error}") from error
    return tuple(images)


def calibrate(args: CalibrateArgs) -> None:
    """Measure, write `{out}.json` and `{out}.png`, and print how to use them. Raises ConfigError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{CALIBRATE} draws a plot and needs matplotlib: pip install matplotlib")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    changes, num_steps = _measure(args)
    from vllm_omni.diffusion.compute.cache.calibration import fit_polynomial, root_mean_square_error

    coefficients = fit_polynomial(changes)
    report: dict[str, Any] = {
        "model": args.config.model,
        "coefficients": coefficients,
        "root_mean_square_error": root_mean_square_error(coefficients, changes),
        "num_prompts": len(args.prompts),
        "num_inference_steps": num_steps,
        "changes": [[c.step, c.signal, c.output] for c in changes],
    }
    Path(f"{args.out}.json").write_text(json.dumps(report, indent=1))
    _plot(changes, coefficients, args.config.model, Path(f"{args.out}.png"))
    print(f"{len(changes)} changes, root mean square error {report['root_mean_square_error']:.4f}")
    print(f"wrote {args.out}.json and {args.out}.png; copy the first to the model folder as {TEA_CACHE_FILE}, or use")
    print(f"--cache-backend tea_cache --cache-config '{json.dumps({'coefficients': coefficients})}'")


def _measure(args: CalibrateArgs) -> tuple[list[Change], int]:
    """Changes from step to step, and the number of steps of a picture."""
    # Not at the top: these modules import torch.
    from vllm_omni.diffusion.catalog.model_check import check_model_files
    from vllm_omni.diffusion.catalog.registry import load_model_info
    from vllm_omni.diffusion.compute.worker.calibration_run import measure_changes
    from vllm_omni.diffusion.compute.worker.runner import ModelRunner
    from vllm_omni.diffusion.control.request_builder import RequestBuilder

    config = args.config
    info = load_model_info(
        config.model, config.load_format, HubAccess.of(config), lambda info: info.check_settings(config)
    )
    config = config.with_adapter_files()
    check_model_files(info, config)
    images = _read_images(args.images, info)
    runner = ModelRunner(config, info)
    builder = RequestBuilder(config, info, runner.start())
    try:
        requests = [
            scheduled.request
            for i, prompt in enumerate(args.prompts)
            for scheduled in builder.build(
                OmniPrompt(prompt, negative_prompt=" ", images=images),
                replace(args.params, seed=(args.params.seed or 0) + i),
                f"{i}",
            )
        ]
    except InvalidRequestError as error:
        raise ConfigError(f"{CALIBRATE}: {error}") from error
    return measure_changes(runner, requests), requests[0].num_inference_steps


def _plot(changes: Sequence[Change], coefficients: Sequence[float], model: str, path: Path) -> None:
    """Plot the changes of every step of every sequence, coloured by step, and the fitted curve."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    signal = [c.signal for c in changes]
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    dots = axes.scatter(signal, [c.output for c in changes], c=[c.step for c in changes], s=8, cmap="viridis")
    grid = np.linspace(min(signal), max(signal), 200)
    axes.plot(grid, np.polyval(list(coefficients), grid), color="red", label="least squares, degree 4")
    axes.set(xlabel="relative change of the modulated input", ylabel="relative change of the output", title=model)
    axes.legend()
    figure.colorbar(dots, label="step")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
