"""Least time that a denoising step can take, from a transformer's config; without weights and GPU.

    python -m benchmarks.roofline                                   # all published sizes on an H100 and an H200
    python -m benchmarks.roofline --model wan-14b --size 1280x720 --frames 81 --ulysses 2
    python -m benchmarks.roofline --model FOLDER --ulysses 2 --cfg 2 --size 2048x2048 --fp8
    python -m benchmarks.roofline --measure                         # and this card's rates at these shapes

TFLOP: products and attention of one step of one rank, all guidance branches. GB: weights, inputs and outputs of the
products, each once. Pointwise: estimated bytes of the other operations (costs.py). A floor follows from the data sheet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.published import TRANSFORMERS, UNGUIDED
from benchmarks.roofline.cards import CARDS, Card, floor_of, wire_bytes
from benchmarks.roofline.costs import StepCost, Transformer, computed_blocks, rank_cost, sequences_of, transformer_of
from vllm_omni.diffusion.data import DiffusionParallelConfig

SIZES, VIDEO_SIZES = ("512x512", "1024x1024", "2048x2048"), ("832x480", "1280x720")
VIDEO_FRAMES = 81


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(TRANSFORMERS), help="a published name, or a model folder")
    parser.add_argument("--size", nargs="+", help=f"WxH in pixels (default: {', '.join((*SIZES, *VIDEO_SIZES))})")
    parser.add_argument("--frames", type=int, help=f"of a video (default: {VIDEO_FRAMES})")
    parser.add_argument("--card", nargs="+", default=list(CARDS), choices=CARDS)
    parser.add_argument("--batch", type=int, default=1, help="requests in the step")
    parser.add_argument("--text-tokens", type=int, default=64, help="of the prompt, as the transformer sees it")
    parser.add_argument("--negative-tokens", type=int, default=6, help="of the negative prompt")
    guidance_help = "two branches a request (default: as the published model is used)"
    parser.add_argument("--guidance", action=argparse.BooleanOptionalAction, help=guidance_help)
    parser.add_argument("--cached", type=float, default=0.0, help="part of the steps that a step cache skips")
    parser.add_argument("--fp8", action="store_true", help="the products of the blocks in float8")
    for axis in ("ulysses", "ring", "cfg", "tensor"):
        parser.add_argument(f"--{axis}", type=int, default=1, help="degree of parallelism")
    parser.add_argument("--measure", action="store_true", help="the ceilings of the device at hand, at these shapes")
    return parser.parse_args(argv)


def read_transformer(model: str) -> Mapping[str, Any]:
    """Transformer of a published config, or of a model folder."""
    if model in TRANSFORMERS:
        return TRANSFORMERS[model]
    config: Mapping[str, Any] = json.loads((Path(model) / "transformer" / "config.json").read_text())
    return config


def num_parameters(config: Mapping[str, Any]) -> int:
    """Number of parameters of the whole transformer."""
    import torch

    from vllm_omni.diffusion.compute.distributed.groups import Group
    from vllm_omni.diffusion.compute.families.qwen_image.config import QwenImageConfig
    from vllm_omni.diffusion.compute.families.qwen_image.transformer import QwenImageTransformer
    from vllm_omni.diffusion.compute.families.wan.config import WanConfig
    from vllm_omni.diffusion.compute.families.wan.transformer import WanTransformer
    from vllm_omni.diffusion.compute.families.z_image.config import ZImageConfig
    from vllm_omni.diffusion.compute.families.z_image.transformer import ZImageTransformer

    with torch.device("meta"):
        built: torch.nn.Module
        if config["_class_name"] == "QwenImageTransformer2DModel":
            built = QwenImageTransformer(QwenImageConfig.from_dict(config), Group.alone())
        elif config["_class_name"] == "WanTransformer3DModel":
            built = WanTransformer(WanConfig.from_dict(config), Group.alone())
        else:
            built = ZImageTransformer(ZImageConfig.from_dict(config), Group.alone())
    return sum(parameter.numel() for parameter in built.parameters())


def row(name: str, size: str, cost: StepCost, card: Card, parallel: DiffusionParallelConfig, fp8: bool) -> str:
    floor = floor_of(cost, card, parallel, fp8)
    gigabytes = sum(gemm.num_bytes(1 if fp8 and "." in gemm.name else 2) for gemm in cost.gemms) / 1e9
    exchanged = sum(wire_bytes(cost.exchanges, parallel).values()) / 1e6
    seconds = (floor.gemms, floor.attention, floor.pointwise, floor.exchanges, floor.total)
    numbers = " | ".join(f"{1e3 * s:.2f}" for s in seconds)
    return (
        f"| {name} | {size} | {card.name} | {cost.flops / 1e12:.1f} | {cost.attention_flops / cost.flops:.0%} "
        f"| {gigabytes:.1f} | {cost.pointwise_bytes / 1e9:.1f} | {exchanged:.0f} | {numbers} |"
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    parallel = DiffusionParallelConfig(args.ulysses, args.ring, args.cfg, args.tensor)
    models: dict[str, Transformer] = {}
    for name in args.model:
        config = read_transformer(name)
        models[name] = transformer_of(config)
        print(f"{name}: {num_parameters(config) / 1e9:.2f} billion parameters")
    print("\n| model | size | card | TFLOP | of it attention | GEMM GB | pointwise GB | sent MB ", end="")
    print("| GEMM ms | attention ms | pointwise ms | exchange ms | floor ms |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name, model in models.items():
        is_guided = name not in UNGUIDED if args.guidance is None else args.guidance
        text = [args.text_tokens] + [args.negative_tokens] * is_guided
        is_video = model.frame_multiple > 1
        frames = args.frames or (VIDEO_FRAMES if is_video else 1)
        for size in args.size or (VIDEO_SIZES if is_video else SIZES):
            width, height = map(int, size.split("x"))
            requests = sequences_of(model, height, width, text, args.batch, frames)
            cost = rank_cost(model, requests, parallel, blocks=computed_blocks(model, args.cached))
            for card in args.card:
                print(row(name, size, cost, CARDS[card], parallel, args.fp8))
            if args.measure:
                from benchmarks.roofline.measured import print_ceilings

                print_ceilings(cost)


if __name__ == "__main__":
    main()
