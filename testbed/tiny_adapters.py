"""Random LoRA adapters for the transformers of tiny models, in the forms that trainers write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
"""Weights of one layer: A [rank, inputs], B [outputs, rank]."""


def random_pairs(
    transformer: nn.Module, seed: int, rank: int = 4, size: float = 0.5, part: str = ""
) -> dict[str, Pair]:
    """Weights of every linear layer whose name holds `part`, by its name. size: of a change beside the layer's own."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and part in name:
            down = torch.randn((rank, layer.in_features), generator=generator) * layer.in_features**-0.5
            up = torch.randn((layer.out_features, rank), generator=generator) * size * rank**-0.5
            pairs[name] = down, up
    return pairs


def transformer_of(model: Path, component: str = "transformer") -> Any:
    """diffusers' transformer of a model folder."""
    return getattr(DiffusionPipeline.from_pretrained(model, dtype=torch.float32), component)


def save_peft(pairs: Mapping[str, Pair], file: Path, prefix: str = "transformer.") -> Path:
    """File with the names that diffusers and peft write."""
    weights = {f"{prefix}{name}.lora_A.weight": down for name, (down, _) in pairs.items()}
    weights |= {f"{prefix}{name}.lora_B.weight": up for name, (_, up) in pairs.items()}
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file)
    return file


def save_kohya(pairs: Mapping[str, Pair], file: Path, alpha: float = 2.0) -> Path:
    """File of the same changes with the names that Kohya writes, and an alpha for each layer."""
    weights = {}
    for name, (down, up) in pairs.items():
        flat = "lora_unet_" + name.replace(".", "_")
        weights[f"{flat}.lora_down.weight"] = down.contiguous()
        weights[f"{flat}.lora_up.weight"] = (up * len(down) / alpha).contiguous()
        weights[f"{flat}.alpha"] = torch.tensor(alpha)
    save_file(weights, file)
    return file


WAN_NAMES = {
    "attn1.to_out.0": "self_attn.o", "attn2.to_out.0": "cross_attn.o", "attn1.to_": "self_attn.",
    "attn2.to_": "cross_attn.", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "proj_out": "head.head",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
}  # fmt: skip
"""Part of a layer's name in diffusers -> in Wan's own code, whose names trainers for ComfyUI use."""


def with_names_of_wan(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The same changes with the names of Wan's own code."""
    renamed = {}
    for name, pair in pairs.items():
        for theirs, its in WAN_NAMES.items():
            name = name.replace(theirs, its)
        renamed[name] = pair
    return renamed


def save_comfyui(pairs: Mapping[str, Pair], file: Path) -> Path:
    """File of the same changes as trainers for ComfyUI write it."""
    return save_peft(pairs, file, prefix="diffusion_model.")
