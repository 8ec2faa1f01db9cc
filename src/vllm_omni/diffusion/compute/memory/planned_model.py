"""Weights of a model on one rank, by component: built as the loader does, but on the meta device, without memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from vllm_omni.diffusion.catalog.folder_files import MODEL_INDEX, names_in, read_object
from vllm_omni.diffusion.catalog.model_index import read_components
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.catalog.weight_files import choose_all, stored_weights
from vllm_omni.diffusion.catalog.whole_info import WholeModelInfo
from vllm_omni.diffusion.compute.device.flat_weights import FlatWeights
from vllm_omni.diffusion.compute.distributed.mesh import Mesh
from vllm_omni.diffusion.compute.families.component_loader import ComponentLoader
from vllm_omni.diffusion.compute.families.flow_pipeline import FlowPipeline
from vllm_omni.diffusion.compute.startup import model_start
from vllm_omni.diffusion.compute.step.transformer import PackedTransformer
from vllm_omni.diffusion.data import OmniDiffusionConfig

META = torch.device("meta")
COMPONENTS = ("text_encoder", "image_encoder", "transformer", "vae")
"""Components with weights, in the order in which a request uses them."""


@dataclass(frozen=True)
class PlannedModel:
    """Bytes of a model's weights on one rank, and numbers that its work depends on."""

    component_bytes: Mapping[str, int]
    """Weights by component, wherever they rest."""
    kept_bytes: int = 0
    """Most bytes that are kept on the device for further requests: rows of modulation, embeddings."""
    host_bytes: int = 0
    """Weights that are not on the device: streamed from host memory, or kept by other ranks."""
    slot_bytes: int = 0
    """Slots on the device, through which these weights stream."""
    step_weights: int = 0
    """Weights of the transformer's products that one token meets in a step, on one rank."""
    step_weight_bytes: int = 0
    """Bytes of the blocks of one transformer that a step runs."""
    encoder_width: int = 0
    """Most features of a token inside the text encoder."""

    @property
    def weight_bytes(self) -> int:
        return sum(self.component_bytes.values())


@torch.inference_mode()
def plan_packed(config: OmniDiffusionConfig, info: PackedModelInfo, dtype: torch.dtype, rank: int = 0) -> PlannedModel:
    """Plan a packed family's model. Raises ConfigError as the loading does for configs that do not fit."""
    # None of these changes the bytes of a weight, and all may need the device.
    config = replace(config, kernels="torch", attention_backend=None, enable_cpu_offload=False)
    mesh = Mesh.unconnected(config.parallel, rank, shards_weights=config.weight_sharding)
    loader = ComponentLoader(config, info, META, dtype, lambda count: None, mesh)
    cls = model_start.pipeline_class(info.family)
    assert issubclass(cls, FlowPipeline)
    pipeline = cls.build(loader)
    transformer: PackedTransformer = pipeline.transformer
    offload = loader.layer_offload
    encoder = loader.components.get("text_encoder", [])
    linears = [module for part in encoder for module in part.modules() if isinstance(module, torch.nn.Linear)]
    return PlannedModel(
        {name: FlatWeights(loader.components[name]).num_bytes for name in COMPONENTS if name in loader.components},
        cls.kept_bytes,
        0 if offload is None else offload.num_host_bytes,
        0 if offload is None else offload.num_slot_bytes,
        _step_weights(transformer) // info.num_streams,
        FlatWeights(transformer.blocks, _modulation(transformer)).num_bytes,
        max((max(linear.weight.shape) for linear in linears), default=0),
    )


def _modulation(transformer: PackedTransformer) -> list[torch.Tensor]:
    """Weights in the blocks that a step does not read, because rows of modulation are kept."""
    layers = (
        module
        for block in transformer.blocks
        for path, module in block.named_modules()
        if path.rpartition(".")[2] in transformer.modulation_layers
    )
    return [parameter for layer in layers for parameter in layer.parameters()]


def _step_weights(transformer: PackedTransformer) -> int:
    left_out = {id(parameter) for parameter in _modulation(transformer)}
    parameters = (parameter for block in transformer.blocks for parameter in block.parameters())
    return sum(p.numel() for p in parameters if p.dim() == 2 and id(p) not in left_out)


def plan_whole(config: OmniDiffusionConfig, info: WholeModelInfo, dtype: torch.dtype) -> PlannedModel:
    """Plan a model that diffusers runs, from the headers of its weight files. Raises ConfigError for broken files."""
    components = read_components(read_object(info.path, MODEL_INDEX))
    folders = {name: names_in(info.path, name) for name in components}
    sizes = {}
    for name in choose_all(components, folders, config.variant):
        weights = stored_weights(info.path / name, config.variant, components[name].stems)
        sizes[name] = dtype.itemsize * sum(math.prod(weight.shape) for weight in weights.values())
    return PlannedModel(sizes)
