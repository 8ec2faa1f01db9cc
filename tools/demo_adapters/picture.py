"""Draw one prompt with none, each and several of the demo model's adapters, in one batch, for README.md.

python -m tools.demo_adapters.picture --out docs/demo_adapters.png
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vllm_omni import AsyncOmni
from vllm_omni.diffusion.control.events import EngineObserver
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult
from vllm_omni.inputs.data import LoRARequest, OmniDiffusionSamplingParams
from vllm_omni.outputs import OmniRequestOutput

from ..demo_model.sampling import grid

PROMPTS = ("a lighthouse", "a taxi")
COLUMNS: tuple[tuple[str, Mapping[str, float]], ...] = (
    ("no adapter", {}),
    ("night", {"night": 1.0}),
    ("lighthouse", {"lighthouse": 1.0}),
    ("fast (4 steps)", {"fast": 1.0}),
    ("both at 0.5", {"night": 0.5, "lighthouse": 0.5}),
)
SIDE = 128


class LargestStep(EngineObserver):
    """Most requests that advanced in one step."""

    def __init__(self) -> None:
        self.size = 0

    def on_step(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        self.size = max(self.size, len(plan.denoise))


def parameters(scales: Mapping[str, float], side: int, seed: int) -> OmniDiffusionSamplingParams:
    loras = [LoRARequest(name, scale=scale) for name, scale in scales.items()]
    return OmniDiffusionSamplingParams(lora_request=loras or None, height=side, width=side, seed=seed, output_type="np")


async def draw(side: int, seed: int) -> tuple[list[np.ndarray], int]:
    """Pictures of all prompts and columns, uint8 [side, side, 3], and how many were computed in one step."""
    observer = LargestStep()
    # No limit of tokens: all pictures advance in each step, also on a CPU, where smaller steps would be as fast.
    async with AsyncOmni(model="demo", observer=observer, max_batch_tokens=2**20) as omni:

        async def one(prompt: str, scales: Mapping[str, float]) -> OmniRequestOutput:
            async for output in omni.generate(prompt, parameters(scales, side, seed)):
                last = output
            return last

        made = await asyncio.gather(*(one(prompt, scales) for prompt in PROMPTS for _, scales in COLUMNS))
    return [np.asarray(output.images[0]) for output in made], observer.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("docs/demo_adapters.png"))
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    pictures, in_one_step = asyncio.run(draw(args.side, args.seed))
    captions = [f"{prompt}\n{name}" for prompt in PROMPTS for name, _ in COLUMNS]
    grid(pictures, captions, columns=len(COLUMNS), cell=args.side + 16).save(args.out, optimize=True)
    print(f"{args.out}: {len(pictures)} pictures, {in_one_step} in one step")


if __name__ == "__main__":
    main()
