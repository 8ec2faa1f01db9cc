"""Trainable low-rank changes of a Qwen-Image transformer's linear layers, and their file in diffusers' format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline
from torch import nn

RANK = 4
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_BLOCK = (*(f"attn.{name}" for name in _ATTENTION), "img_mod.1", "img_mlp.net.0.proj", "img_mlp.net.2")
_OTHERS = ("img_in", "norm_out.linear", "proj_out")


class LowRank(nn.Module):
    """Linear layer plus `scale * B(A x)`, which starts as zero. `scales` holds one scale for each row of the batch,
    or nothing, which means 1."""

    def __init__(self, base: nn.Linear, scales: list[torch.Tensor], generator: torch.Generator) -> None:
        super().__init__()
        self._base, self._scales = [base], scales  # in a list: not trained, not part of this module
        first = torch.randn(RANK, base.in_features, generator=generator) / base.in_features**0.5
        self.lora_A = nn.Parameter(first.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, RANK, device=base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change = F.linear(F.linear(x, self.lora_A), self.lora_B)
        if self._scales:
            change = change * self._scales[0].view(-1, *[1] * (x.dim() - 1)).to(change.dtype)
        y: torch.Tensor = self._base[0](x) + change
        return y


class Adapter(nn.Module):
    """All low-rank changes of a transformer, which then computes with them. The transformer's weights stay fixed."""

    def __init__(self, transformer: Any, seed: int) -> None:
        super().__init__()
        self._scales: list[torch.Tensor] = []
        generator = torch.Generator().manual_seed(seed)
        blocks = range(len(transformer.transformer_blocks))
        names = [f"transformer_blocks.{i}.{name}" for i in blocks for name in _BLOCK] + list(_OTHERS)
        transformer.requires_grad_(False)
        self._layers: dict[str, LowRank] = {}
        for number, name in enumerate(names):
            layer = LowRank(transformer.get_submodule(name), self._scales, generator)
            self.add_module(str(number), layer)
            self._layers[name] = layer
            transformer.set_submodule(name, layer)

    def set_scales(self, scales: torch.Tensor) -> None:
        """Scales of the next batch, one for each row. Their address must stay the same in a captured step."""
        self._scales[:] = [scales]

    def save(self, folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors` in fp16, without layers that nothing depends on."""
        tensors: dict[str, torch.Tensor] = {}
        for name, layer in self._layers.items():
            if layer.lora_B.any():
                for part, value in layer.named_parameters():
                    tensors[f"{name}.{part}.weight"] = value.detach().to("cpu", torch.float16).contiguous()
        QwenImagePipeline.save_lora_weights(folder, transformer_lora_layers=tensors)
