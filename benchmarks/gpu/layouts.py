"""Section `layouts`: steps and pictures on several GPUs against one, by size, with and without a step cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.bench import NEGATIVE, PROMPT, Bench, Lazy, Size
from benchmarks.gpu.engine import forced_cache, forced_mask
from benchmarks.gpu.kernels import HIGHEST_PSNR
from benchmarks.gpu.report import Case, Row
from benchmarks.roofline.cards import floor_of, wire_bytes
from benchmarks.roofline.costs import Branch, computed_blocks, rank_cost
from benchmarks.timing import Spread
from testbed.runner_driver import psnr
from vllm_omni import Omni
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.data import OmniPrompt
from vllm_omni.outputs import OmniRequestOutput

MODEL = "qwen-image"
SIZES = (1024, 1536, 2048)
WARM_UP_STEPS, NUM_STEPS, CACHED_STEPS = 4, 20, 50
REPEATS = 2
REPEATED_SECONDS = 4.0
"""Seconds up to which a measurement is repeated; a longer one is made once."""
LONG_TEXT_TOKENS = 500


def parse_layout(text: str) -> dict[str, int]:
    """Degrees by field from `ulysses=2,cfg=2`. Raises ValueError with the accepted names."""
    names = {f.name.split("_")[0]: f.name for f in fields(DiffusionParallelConfig)[:5]}
    layout = {}
    for part in text.split(","):
        name, _, degree = part.partition("=")
        if name not in names or not degree.isdigit():
            raise ValueError(f"a layout is NAME=DEGREE,... of {', '.join(names)}, got {text!r}")
        layout[names[name]] = int(degree)
    return layout


def name_of(layout: dict[str, int]) -> str:
    return " x ".join(f"{axis.split('_')[0]} {degree}" for axis, degree in layout.items()) or ONE


ONE = "one device"


def check_devices(bench: Bench, count: int) -> None:
    """Raise ConfigError if GPUs are measured and fewer than `count` are present."""
    if bench.device.type == "cuda" and count > (there := torch.cuda.device_count()):
        raise ConfigError(f"needs {count} GPUs, this machine has {there}")


def section_layouts(bench: Bench) -> Iterator[Case]:
    """Measure each layout: steps of every size, steps with a long prompt, then pictures with the forced cache."""
    sizes = [bench.size(side) for side in (SIZES[:1] if bench.tiny else SIZES)]
    for degrees in ({}, *bench.layouts):
        layout = Layout(bench, name_of(degrees), DiffusionParallelConfig(**degrees))
        with Lazy(layout.start, lambda started: started.close()) as omni:
            for size in sizes:
                yield Case(layout.case(size), partial(layout.steps, omni, size), layout.predicted(size))
            yield Case(layout.long_case(sizes[0]), partial(layout.long_text, omni, sizes[0]), layout.predicted_long())
            for size in sizes:
                predicted = layout.predicted_picture(size)
                yield Case(layout.cached_case(size), partial(layout.cached, omni, size), predicted)


@dataclass(frozen=True)
class Layout:
    """Cases of one layout. Predictions are floors, with no exchange hidden."""

    bench: Bench
    name: str
    parallel: DiffusionParallelConfig

    def start(self) -> Omni:
        check_devices(self.bench, self.parallel.world_size)
        return self.bench.omni(MODEL, parallel_config=self.parallel, **forced_cache(self.num_cached_steps))

    @property
    def num_cached_steps(self) -> int:
        """Steps of a picture with the cache; enough for the pattern to skip one."""
        return max(16, self.bench.steps(CACHED_STEPS))

    def case(self, size: Size, name: str | None = None) -> str:
        return f"{name or self.name}, {size[1]}x{size[0]}"

    def cached_case(self, size: Size, name: str | None = None) -> str:
        return f"{self.case(size, name)}, {self.num_cached_steps} steps, cached"

    def long_case(self, size: Size, name: str | None = None) -> str:
        return f"{self.case(size, name)}, long prompts"

    def predicted(self, size: Size) -> float | None:
        return self.bench.predict(MODEL, [size], self.parallel)

    def predicted_picture(self, size: Size) -> float | None:
        """Predicted milliseconds of denoising a cached picture."""
        count = self.num_cached_steps
        blocks = computed_blocks(self.bench.shape(MODEL), forced_mask(count).count(0) / count)
        step = self.bench.predict(MODEL, [size], self.parallel, blocks)
        return step and step * count

    def predicted_long(self) -> float | None:
        card, size = self.bench.card, self.bench.size(SIZES[0])
        if card is None:
            return None
        _, tokens = long_prompt(self.bench)
        branches = [[Branch(tokens, self.bench.info(MODEL).num_image_tokens(*size))] * 2]
        cost = rank_cost(self.bench.shape(MODEL), branches, self.parallel)
        return 1e3 * floor_of(cost, card, self.parallel).total

    def steps(self, omni: Lazy[Omni], size: Size) -> list[Row]:
        """Rows of a picture without a cache: milliseconds per step, and PSNR to one device's picture."""
        seconds, output = self._step_seconds(omni.get(), size, OmniPrompt(PROMPT, NEGATIVE))
        cost = self.bench.cost(MODEL, [size], self.parallel)
        detail: dict[str, Any] = {"steps": NUM_STEPS}
        if one := self._measured(self.case(size, ONE)):
            detail |= self._gain("", one / (1e3 * seconds.median))
        detail |= self._compared(size, output.images[0])
        detail["predicted MB sent"] = sum(wire_bytes(cost.exchanges, self.parallel).values()) / 1e6
        return [Row.milliseconds(self.case(size), seconds, self.predicted(size), **detail)]

    def long_text(self, omni: Lazy[Omni], size: Size) -> list[Row]:
        """Rows of a step with long prompts against one with short prompts: the cost of text tokens."""
        text, tokens = long_prompt(self.bench)
        seconds, _ = self._step_seconds(omni.get(), size, OmniPrompt(text, text))
        detail: dict[str, Any] = {"text tokens of each branch": tokens}
        if short := self._measured(self.case(size)):
            detail["of it for the longer text, ms"] = 1e3 * seconds.median - short
            (branches,) = self.bench.branches(MODEL, [size])
            detail["more tokens"] = 2 * tokens - sum(branch.text for branch in branches)
        return [Row.milliseconds(self.long_case(size), seconds, self.predicted_long(), **detail)]

    def cached(self, omni: Lazy[Omni], size: Size) -> list[Row]:
        """Rows of denoising a picture with the forced pattern, against one device without and with the cache."""
        count, case = self.num_cached_steps, self.cached_case(size)
        timings = self._picture(omni.get(), size, OmniPrompt(PROMPT, NEGATIVE), count, cache=True).timings
        total, skipped = 1e3 * timings["denoise"], timings["cached_steps"]
        detail: dict[str, Any] = {"cached steps": skipped}
        if step := self._measured(self.case(size)):
            detail["a skipping step ms"] = (total - step * (count - skipped)) / skipped
            detail["over this layout uncached"] = step * count / total
        if (one_step := self._measured(self.case(size, ONE))) and self.name != ONE:
            detail |= self._gain(" over one device uncached", one_step * count / total)
        if one_total := self._measured(self.cached_case(size, ONE)):
            detail |= self._gain(" over one device cached", one_total / total)
        return [Row(case, total, "ms", self.predicted_picture(size), detail=detail)]

    def _step_seconds(self, omni: Omni, size: Size, prompt: OmniPrompt) -> tuple[Spread, OmniRequestOutput]:
        """Mean seconds per step of a picture, and the last picture; a shorter picture warms up."""
        self._picture(omni, size, prompt, WARM_UP_STEPS, cache=False)
        outputs: list[OmniRequestOutput] = []
        while len(outputs) < REPEATS:
            outputs.append(self._picture(omni, size, prompt, NUM_STEPS, cache=False))
            if outputs[-1].timings["denoise"] > REPEATED_SECONDS:
                break
        return Spread.of([output.timings["denoise"] / NUM_STEPS for output in outputs]), outputs[-1]

    def _picture(self, omni: Omni, size: Size, prompt: OmniPrompt, steps: int, cache: bool) -> OmniRequestOutput:
        (output,) = omni.generate(prompt, self.bench.params(MODEL, size, steps, cache=cache))
        return output

    def _measured(self, case: str) -> float | None:
        return next((row.measured for row in self.bench.report.rows("layouts") if row.case == case), None)

    def _gain(self, over: str, gain: float) -> dict[str, float]:
        return {f"speed-up{over}": gain, f"efficiency{over}": gain / self.parallel.world_size}

    def _compared(self, size: Size, picture: np.ndarray) -> dict[str, float]:
        """PSNR to the picture of one device, which is stored beside the rows."""
        file = self.bench.report.folder / "pictures" / f"{MODEL}-{size[1]}x{size[0]}.npy"
        if self.name == ONE:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, picture)
            return {"deviation of its pixels": float(picture.std())}
        return {"dB to one device": min(HIGHEST_PSNR, psnr(picture, np.load(file)))} if file.is_file() else {}


def long_prompt(bench: Bench) -> tuple[str, int]:
    """Prompt of at most LONG_TEXT_TOKENS tokens, and its number of tokens."""
    count = bench.info(MODEL).count_prompt_tokens
    fewest, most = 1, LONG_TEXT_TOKENS
    while fewest < most:
        middle = (fewest + most + 1) // 2
        fewest, most = (middle, most) if count(_words(middle)) <= LONG_TEXT_TOKENS else (fewest, middle - 1)
    return _words(fewest), count(_words(fewest))


def _words(count: int) -> str:
    return " ".join(PROMPT.split()[i % len(PROMPT.split())] for i in range(count))
