"""Shared parts of all sections: models, sizes, engines, and the card for predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch

from benchmarks.gpu.models import SHALLOW, transformer_config, write_model
from benchmarks.gpu.report import Report
from benchmarks.published import UNGUIDED
from benchmarks.roofline.cards import Card, floor_of
from benchmarks.roofline.costs import ONE_DEVICE, Branch, StepCost, Transformer, branch_of, rank_cost, transformer_of
from benchmarks.roofline.measured import card_at_hand
from benchmarks.timing import release_memory
from vllm_omni import Omni
from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt

PROMPT = "a photo of a red apple and a blue car on a wooden table"
NEGATIVE = " "
TINY_DIVISOR, TINY_FRAMES = 16, 5
CEILINGS_MODELS = ("qwen-image", "wan-14b")
"""Models whose measured rates predict others that have none in the file."""
Size = tuple[int, ...]
"""Height and width in pixels, and the number of frames of a video."""


@dataclass(frozen=True)
class Bench:
    report: Report
    models: Path
    """Folder for model folders."""
    device: torch.device
    tiny: bool
    """Run the same code on small shapes, to try it."""
    quick: bool
    """Fewer steps per picture; rows say how many."""
    layouts: tuple[dict[str, int], ...]
    enforce_eager: bool = False
    """Setting of all engines: neither compile nor capture CUDA graphs."""

    def model(self, name: str) -> str:
        return str(write_model(name, self.models / f"{name}{'-tiny' * self.tiny}", self.tiny))

    def info(self, name: str) -> ModelInfo:
        return load_model_info(self.model(name))

    def shape(self, name: str) -> Transformer:
        return transformer_of(transformer_config(name, self.tiny))

    def size(self, height: int, width: int | None = None) -> Size:
        """Size of a square picture; scaled down for `tiny`."""
        sides = (height, width or height)
        if not self.tiny:
            return sides
        return tuple(max(32, side // TINY_DIVISOR // 16 * 16) for side in sides)

    def video(self, height: int, width: int, frames: int) -> Size:
        """Size of a video; scaled down for `tiny`."""
        return *self.size(height, width), min(frames, TINY_FRAMES) if self.tiny else frames

    def steps(self, count: int) -> int:
        return max(4, count // 10) if self.tiny or self.quick else count

    def prompt(self, name: str) -> OmniPrompt:
        return OmniPrompt(PROMPT) if name in UNGUIDED else OmniPrompt(PROMPT, NEGATIVE)

    def params(self, name: str, size: Size, steps: int, **changes: Any) -> OmniDiffusionSamplingParams:
        return OmniDiffusionSamplingParams(
            **{
                "height": size[0],
                "width": size[1],
                "num_inference_steps": steps,
                "seed": 1,
                "output_type": "np",
                **({"guidance_scale": 0.0} if name in UNGUIDED else {"true_cfg_scale": 4.0}),
                **changes,
            }
        )

    def start_afresh(self) -> None:
        """Free the memory and compiled code of earlier models, before the next is loaded."""
        torch.compiler.reset()  # otherwise the limit of shapes that a function is compiled for is reached
        release_memory(self.device)

    def omni(self, name: str, **settings: Any) -> Omni:
        """Engine with random weights, in worker processes."""
        return Omni(
            model=self.model(name),
            load_format="dummy",
            progress_bar=False,
            **{"enforce_eager": self.enforce_eager, **settings},
        )

    def branches(self, name: str, sizes: Sequence[Size], guided: bool = True) -> list[list[Branch]]:
        """Sequences of one request of each size. guided: all branches, where the model has guidance; else the first."""
        info, shape = self.info(name), self.shape(name)
        prompt = self.prompt(name)
        texts = [prompt.prompt]
        if guided and prompt.negative_prompt is not None:
            texts.append(prompt.negative_prompt)
        counts = [info.count_prompt_tokens(text) for text in texts]
        return [[branch_of(shape, text, info.num_image_tokens(*size)) for text in counts] for size in sizes]

    def cost(
        self,
        name: str,
        sizes: Sequence[Size],
        parallel: DiffusionParallelConfig = ONE_DEVICE,
        blocks: float | None = None,
        guided: bool = True,
    ) -> StepCost:
        return rank_cost(self.shape(name), self.branches(name, sizes, guided), parallel, blocks=blocks)

    @property
    def card(self) -> Card | None:
        return self.card_for(CEILINGS_MODELS[0])

    def card_for(self, name: str) -> Card | None:
        """Card with the rates that section `ceilings` measured at the model's shapes; None for an unknown card.

        Without them the rates at the shapes of another model, or else those of the data sheet.
        """
        rates = {row.case: row.measured for row in self.report.rows("ceilings")}
        promised = card_at_hand()
        links = promised.link_bytes if promised else math.inf
        for model in (name.removesuffix(SHALLOW), *CEILINGS_MODELS):
            gemm, fp8, attention, copy = (
                rates.get(f"{model} {kind}, all shapes") for kind in ("gemm", "fp8", "attention", "copy")
            )
            if gemm and attention and copy:
                return Card("measured", gemm * 1e12, (fp8 or gemm) * 1e12, copy * 1e12, links, attention * 1e12)
        return promised

    def predict(
        self,
        name: str,
        sizes: Sequence[Size],
        parallel: DiffusionParallelConfig = ONE_DEVICE,
        blocks: float | None = None,
        fp8: bool = False,
        guided: bool = True,
    ) -> float | None:
        """Predicted milliseconds of a step; None for an unknown card."""
        card = self.card_for(name)
        if card is None:
            return None
        return 1e3 * floor_of(self.cost(name, sizes, parallel, blocks, guided), card, parallel, fp8).total


Subject = TypeVar("Subject")


class Lazy(Generic[Subject]):
    """Object that several cases share: made at first use, closed at the end; an error at its making is kept."""

    def __init__(self, make: Callable[[], Subject], close: Callable[[Subject], object]) -> None:
        self._make = make
        self._close = close
        self._made: list[Subject] = []
        self._refusal: Exception | None = None

    def get(self) -> Subject:
        if self._refusal is not None:
            raise self._refusal
        if not self._made:
            try:
                self._made.append(self._make())
            except Exception as error:
                self._refusal = error
                raise
        return self._made[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._made:
            self._close(self._made.pop())
