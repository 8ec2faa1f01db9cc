"""Time of a denoising step whose sequences have LoRA adapters, relative to the same step without.

    python -m benchmarks.lora                                    # the demo model; any machine
    python -m benchmarks.lora --model Qwen/Qwen-Image --size 1024x1024 --sequences 2

Each sequence has one adapter, and the adapters of the sequences are the same one, or several in turn. Adapters are
random and change all linear layers of the blocks but modulation. A step with merged weights takes as long as one
without adapters.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.timing import measure
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.families.flow_pipeline import FlowPipeline
from vllm_omni.diffusion.compute.weights.adapter_layers import layer_targets
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest, LoRA


def save_adapter(pipeline: FlowPipeline[Any, Any, Any], file: Path, rank: int, seed: int) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, target in layer_targets(pipeline.transformers).items():
        parts = target.path.split(".")
        if not any(map(str.isdigit, parts)) or parts[-1] in pipeline.transformer.modulation_layers:
            continue
        weights[f"{name}.lora_A.weight"] = torch.randn((rank, target.inputs), generator=generator) * 0.01
        weights[f"{name}.lora_B.weight"] = torch.randn((target.outputs, rank), generator=generator) * 0.01
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, file)
    return LoRA(file.stem, str(file), 1.0)


@torch.inference_mode()
def step_seconds(pipeline: FlowPipeline[Any, Any, Any], requests: Sequence[DiffusionRequest], budget: float) -> float:
    """Median seconds of one step of these requests."""
    for request in requests:
        pipeline.check(request)
        pipeline.admit(request)
    states = [pipeline.encode(request) for request in requests]
    seconds = measure(lambda: pipeline.predict(states), states[0].latents.device, warm_ups=3, budget=budget).median
    for state in states:
        pipeline.forget(state)
        pipeline.release(state.request.request_id)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--size", default="64x64", help="WIDTHxHEIGHT")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=5.0, help="budget of one measurement")
    given = parser.parse_args()
    info = load_model_info(given.model)
    runner = ModelRunner(OmniDiffusionConfig(model=given.model), info)
    runner.start()
    assert isinstance(runner.pipeline, FlowPipeline), "a packed family"
    width, height = map(int, given.size.split("x"))
    plain = [
        DiffusionRequest(f"{i}", "a red apple", height, width, 20, i, info.max_prompt_tokens)
        for i in range(given.sequences)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for rank in given.ranks:
            loras = [
                save_adapter(runner.pipeline, Path(folder, f"{rank}-{seed}.safetensors"), rank, seed)
                for seed in range(min(max(given.adapters), given.sequences))
            ]
            base = step_seconds(runner.pipeline, plain, given.seconds)
            print(f"rank {rank}: {given.sequences} sequences without adapters {1e3 * base:.2f} ms", flush=True)
            for count in given.adapters:
                requests = [replace(request, loras=(loras[i % count],)) for i, request in enumerate(plain)]
                seconds = step_seconds(runner.pipeline, requests, given.seconds)
                print(f"rank {rank}: {count} different adapters: {seconds / base:.2f} times as long", flush=True)


if __name__ == "__main__":
    main()
