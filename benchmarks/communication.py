"""Bytes that ranks exchange in a denoising step, by layout: counted, and in theory. Nothing is timed.

    python -m benchmarks.communication              # a random model of 4 layers, 8 heads of 16; gloo processes

In theory, per rank and layer, for t tokens of hidden size h on P ranks: Ulysses sends 4 t h / P (q, k and v, then the
output), a ring 2 t h (P-1)/P (keys and values of the other blocks); combined, each works on the other's share. Tensor
parallelism sums 2 t h (attention and MLP). Once a step, the velocities are gathered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_omni import AsyncOmni
from vllm_omni.diffusion.control.events import EngineObserver
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.plan import EXCHANGES, StepPlan, StepResult
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt

LAYERS, HEADS, HEAD_DIM, FLOAT_BYTES = 4, 8, 16, 4
HIDDEN = HEADS * HEAD_DIM
STEPS = 4
PARAMS = OmniDiffusionSamplingParams(height=256, width=256, num_inference_steps=STEPS, true_cfg_scale=4.0, seed=1)
PROMPT = OmniPrompt("a red apple and a blue car", "a blue apple")
LAYOUTS = (
    {"ulysses_degree": 2},
    {"ulysses_degree": 4},
    {"ring_degree": 2},
    {"ring_degree": 4},
    {"ulysses_degree": 2, "ring_degree": 2},
    {"cfg_parallel_size": 2},
    {"cfg_parallel_size": 2, "ulysses_degree": 2},
    {"tensor_parallel_size": 2},
    {"tensor_parallel_size": 2, "ulysses_degree": 2},
)


class Counting(EngineObserver):
    """Observer that adds up the exchanged bytes of steps that only denoise."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.num_steps = self.num_tokens = 0

    def on_step(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        if result.advanced and not plan.encode and not plan.decode:
            self.sent.update(result.sent_bytes)
            self.num_steps += 1
            self.num_tokens = result.num_tokens


async def measure(model: str, parallel: DiffusionParallelConfig) -> dict[str, Any]:
    """Bytes per rank and step by kind of exchange: counted, and in theory for the transformer's layers."""
    counting = Counting()
    omni = AsyncOmni(model=model, parallel_config=parallel, observer=counting)
    try:
        await omni.start()
        async for _ in omni.generate(PROMPT, PARAMS):
            pass
    finally:
        await omni.close()
    share = parallel.replica_size * counting.num_steps
    counted = {kind: counting.sent[kind] / share for kind in EXCHANGES}
    return {"counted": counted, "theory": theory(parallel, counting.num_tokens / parallel.cfg_parallel_size)}


def theory(parallel: DiffusionParallelConfig, num_tokens: float) -> dict[str, float]:
    """Bytes per rank and step by kind of exchange. `num_tokens`: tokens of one rank group's sequences."""
    ulysses, ring, tensor = parallel.ulysses_degree, parallel.ring_degree, parallel.tensor_parallel_size
    layer = LAYERS * num_tokens * HIDDEN * FLOAT_BYTES
    return {
        "all_to_all": 4 * layer / (ulysses * ring * tensor) if ulysses > 1 else 0.0,
        "p2p": 2 * layer * (ring - 1) / ring / ulysses / tensor,
        "all_reduce": 2 * layer / (ulysses * ring) if tensor > 1 else 0.0,
    }


def name_of(layout: dict[str, int]) -> str:
    return " x ".join(f"{axis.split('_')[0]} {size}" for axis, size in layout.items())


def print_table(rows: dict[str, Any]) -> None:
    print("| layout | all-to-all KiB | theory | P2P KiB | theory | all-reduce KiB | theory | gather KiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [f"{row[which][kind] / 1024:.0f}" for kind in ("all_to_all", "p2p", "all_reduce") for which in row]
        print(f"| {name} | {' | '.join(cells)} | {row['counted']['all_gather'] / 1024:.0f} |")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/communication.json"))
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        from testbed.tiny_models import build_tiny_qwen_image

        model = str(build_tiny_qwen_image(Path(folder) / "model", layers=LAYERS, heads=HEADS, head_dim=HEAD_DIM))
        rows = {name_of(layout): asyncio.run(measure(model, DiffusionParallelConfig(**layout))) for layout in LAYOUTS}
    print_table(rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
