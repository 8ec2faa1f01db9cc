"""Single files with the weights of a tiny model's transformer, by the names under which people have them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from testbed.tiny_adapters import WAN_NAMES

Weights = Mapping[str, Tensor]
_STEM = "diffusion_pytorch_model"
_WAN_NAMES = {
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "attn1.norm_": "self_attn.norm_",
    "attn2.norm_": "cross_attn.norm_",
    ".norm2.": ".norm3.",
    **WAN_NAMES,
    ".scale_shift_table": ".modulation",
    "scale_shift_table": "head.modulation",
}
"""Part of a weight's name in diffusers -> in Wan's own code; the first parts first."""
_Z_IMAGE_NAMES = {
    "all_final_layer.2-1.": "final_layer.",
    "all_x_embedder.2-1.": "x_embedder.",
    ".attention.to_out.0.": ".attention.out.",
    ".attention.norm_k.": ".attention.k_norm.",
    ".attention.norm_q.": ".attention.q_norm.",
}


def folder_weights(folder: Path, component: str = "transformer") -> dict[str, Tensor]:
    """Weights in the one file of a component."""
    weights: dict[str, Tensor] = load_file(folder / component / f"{_STEM}.safetensors")
    return weights


def remove_weights(folder: Path, component: str = "transformer") -> None:
    """Leave of a component its config alone."""
    for file in (folder / component).glob("*.safetensors*"):
        file.unlink()


def with_prefix(weights: Weights, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: weight for name, weight in weights.items()}


def with_own_names(family: str, weights: Weights) -> dict[str, Tensor]:
    """Weights by the names of the model's own code; Qwen-Image's are those of diffusers."""
    if family == "qwen_image":
        return dict(weights)
    names = _WAN_NAMES if family == "wan" else _Z_IMAGE_NAMES
    renamed = {_replaced(name, names): weight for name, weight in weights.items()}
    if family == "z_image":
        for name in [name for name in renamed if name.endswith(".to_q.weight")]:
            parts = [renamed.pop(name.replace("to_q", part)) for part in ("to_q", "to_k", "to_v")]
            renamed[name.replace("to_q", "qkv")] = torch.cat(parts)
    return renamed


def _replaced(name: str, names: Mapping[str, str]) -> str:
    for theirs, own in names.items():
        name = name.replace(theirs, own)
    return name


def scaled_float8(weights: Weights, is_kept: Callable[[str], bool], end: str = ".scale_weight") -> dict[str, Tensor]:
    """Matrices for which `is_kept(name)` in float8 with one scale each, and with a scale of the inputs, as in ComfyUI.

    end: end of the names of scales.
    """
    stored: dict[str, Tensor] = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for name, weight in weights.items():
        if weight.dim() == 2 and name.endswith(".weight") and is_kept(name):
            scale = weight.abs().max() / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix(".weight") + end] = scale
            stored[name.removesuffix(".weight") + ".scale_input"] = torch.tensor(1.0)
        else:
            stored[name] = weight
    return stored


def expanded(stored: Weights) -> dict[str, Tensor]:
    """The weights of `scaled_float8` in float32, without scales."""
    plain = {}
    for name, weight in stored.items():
        if name.endswith((".scale_weight", ".weight_scale", ".scale_input")) or name == "scaled_fp8":
            continue
        layer = name.removesuffix(".weight")
        scale = stored.get(layer + ".scale_weight", stored.get(layer + ".weight_scale", torch.tensor(1.0)))
        plain[name] = weight.float() * scale
    return plain


def save(weights: Weights, file: Path) -> Path:
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file)
    return file


def shard(folder: Path, stem: str, num_shards: int = 3, variant: str | None = None) -> None:
    """Cut the weight file of a component's `folder` into shards with an index, as the libraries name them."""
    file = folder / f"{stem}.safetensors"
    weights = load_file(file)
    file.unlink()
    part = "" if variant is None else f".{variant}"
    names = sorted(weights)
    index: dict[str, str] = {}
    for number in range(num_shards):
        shard_name = f"{stem}{part}-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        members = names[number::num_shards]
        save_file({name: weights[name] for name in members}, folder / shard_name, metadata={"format": "pt"})
        index |= dict.fromkeys(members, shard_name)
    (folder / f"{stem}.safetensors.index{part}.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
