"""Random LoRA adapters on the device, their bytes and FLOPs in a step, and their merging into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.families.flow_pipeline import FlowPipeline
from vllm_omni.diffusion.compute.layers.low_rank import LayerWeights, UpWeight
from vllm_omni.diffusion.compute.layers.rounding import FLOAT8, quantize
from vllm_omni.diffusion.compute.packing import Pack
from vllm_omni.diffusion.compute.step.adapters import LoadedAdapter
from vllm_omni.diffusion.compute.weights.adapter_layers import LayerTarget, layer_targets

Pipeline = FlowPipeline[Any, Any, Any]


@dataclass(frozen=True)
class Traffic:
    """Least work that the changes add to a step."""

    num_bytes: int
    """Bytes of each layer's input and of its output, once each; the weights of the adapters are small beside them."""
    flops: int


def random_adapter(pipeline: Pipeline, rank: int, seed: int) -> LoadedAdapter:
    """Adapter of the first transformer that changes all linear layers of its blocks but modulation."""
    transformer = pipeline.transformer
    generator = torch.Generator(next(transformer.parameters()).device).manual_seed(seed)
    inputs_dtype = next(its.dtype for its in transformer.parameters() if its.dtype != FLOAT8)
    by_path: dict[str, list[LayerTarget]] = {}
    for target in layer_targets([transformer]).values():
        names = target.path.split(".")
        if any(map(str.isdigit, names[:-1])) and names[-1] not in transformer.modulation_layers:
            by_path.setdefault(target.path, []).append(target)

    def random(rows: int, columns: int, weight: Tensor) -> Tensor:
        dtype = inputs_dtype if weight.dtype == FLOAT8 else weight.dtype
        return torch.randn((rows, columns), generator=generator, device=weight.device, dtype=dtype) * 0.01

    layers = {}
    for path, targets in by_path.items():
        weight, parts = targets[0].layer.weight, len(targets)
        ups = [
            UpWeight(
                slice(its.part * its.outputs, (its.part + 1) * its.outputs),
                slice(number * rank, (number + 1) * rank),
                random(its.outputs, rank, weight),
            )
            for number, its in enumerate(targets)
        ]
        layers[path] = LayerWeights(random(parts * rank, targets[0].inputs, weight), tuple(ups))
    none: tuple[dict[str, LayerWeights], ...] = tuple({} for _ in pipeline.transformers[1:])
    return LoadedAdapter((layers, *none), tuple(False for _ in pipeline.transformers), f"{rank} {seed}")


def traffic(pipeline: Pipeline, states: Sequence[Any], adapters: Sequence[LoadedAdapter]) -> Traffic:
    """Traffic of a step of these states, each with its adapter."""
    num_bytes = flops = 0
    for state, adapter in zip(states, adapters, strict=True):
        lengths = [len(text) for text in state.text]
        pack = Pack.build(lengths, [state.num_image_tokens] * len(lengths), torch.device("cpu"))
        for path, weights in adapter.layers[0].items():
            rows = sum(stop - start for start, stop in pipeline.transformer.adapted_tokens(path, pack).ranges)
            outputs = sum(len(up.weight) for up in weights.ups)
            num_bytes += rows * (weights.down.shape[1] + outputs) * weights.down.element_size()
            flops += 2 * rows * (weights.down.numel() + sum(up.weight.numel() for up in weights.ups))
    return Traffic(num_bytes, flops)


def merge(pipeline: Pipeline, adapter: LoadedAdapter, scale: float) -> None:
    """Add scale * B A to the weights."""
    for path, weights in adapter.layers[0].items():
        layer: Any = pipeline.transformer.get_submodule(path)
        weight = layer.weight
        wide = weight.to(weights.down.dtype) * layer.scale.to(weights.down.dtype) if weight.dtype == FLOAT8 else weight
        for up in weights.ups:
            wide[up.columns].addmm_(up.weight, weights.down[up.ranks], alpha=scale)
        if weight.dtype == FLOAT8:
            values, scales = quantize(wide)
            weight.copy_(values)
            layer.scale.copy_(scales)
