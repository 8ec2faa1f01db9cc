"""Loading of the components of a packed family's model folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import nn

from vllm_omni.diffusion.catalog.configs import EULER, SCHEDULER_PLACE, UNIPC
from vllm_omni.diffusion.catalog.folder_files import read_object
from vllm_omni.diffusion.catalog.model_index import DIFFUSERS_STEMS
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.distributed.mesh import Mesh
from vllm_omni.diffusion.compute.layers.kernels import Kernels, create_kernels
from vllm_omni.diffusion.compute.step.unipc import FlowUniPC
from vllm_omni.diffusion.compute.vae.tile_choice import TileChoice
from vllm_omni.diffusion.compute.weights.loading import load_autoencoder, load_weights
from vllm_omni.diffusion.compute.weights.reader import WeightReader
from vllm_omni.diffusion.data import OmniDiffusionConfig

SCHEDULERS = {EULER: FlowMatchEulerDiscreteScheduler, UNIPC: FlowUniPC}
"""Class that a scheduler's config names -> class of the scheduler; `catalog.configs` refuses others."""
Loaded = TypeVar("Loaded")
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class ComponentLoader:
    """Reads the components of one model, each with the weights that this rank keeps."""

    config: OmniDiffusionConfig
    info: PackedModelInfo
    device: torch.device
    dtype: torch.dtype
    on_bytes: Callable[[int], object]
    """Called with the number of bytes read since its last call."""
    mesh: Mesh
    components: dict[str, list[nn.Module]] = field(default_factory=dict)
    """Modules of each component read so far: `text_encoder`, `image_encoder`, `transformer` (all of them), `vae`."""

    @cached_property
    def kernels(self) -> Kernels:
        return create_kernels(self.config.kernels)

    @cached_property
    def tile_choice(self) -> TileChoice:
        """Choice of tiles for decodes and encodes of the VAE; it takes effect by `PackedPipeline.watch_memory`."""
        return TileChoice(partial(self.info.decode_bytes, tile=False, dtype_bytes=self.dtype.itemsize))

    def text_encoder(self, cls: Callable[..., Loaded], *arguments: object) -> Loaded:
        """`cls` for the model folder; `arguments` follow the folder in its call."""
        return cls(self.info.path, *arguments, self._reader(self.dtype, "text_encoder"), self.mesh.text_encoder)

    def image_encoder(self, cls: Callable[..., Loaded], dtype: torch.dtype) -> Loaded:
        """`cls` for the model folder: the encoder of the input pictures that the transformer sees."""
        return cls(self.info.path, self._reader(dtype, "image_encoder"))

    def _reader(self, dtype: torch.dtype, component: str) -> WeightReader:
        modules = self.components.setdefault(component, [])
        return WeightReader(self.device, dtype, self.on_bytes, self.config.load_format, self.config.variant, modules)

    def autoencoder(self, cls: type[Any], dtype: torch.dtype | None = None) -> Any:
        """diffusers' VAE class `cls`, on the CPU. dtype: None for the model's."""
        path, config = self.info.path / "vae", self.config
        dtype = dtype or self.dtype
        vae = load_autoencoder(cls, path, self.device, dtype, self.on_bytes, config.load_format, config.variant)
        self.components.setdefault("vae", []).append(vae)
        return vae

    def transformer(
        self,
        build: Callable[[Group, Kernels], Module],
        checkpoint_names: Mapping[str, tuple[str, ...]],
        float8_layers: tuple[str, ...],
        component: str = "transformer",
    ) -> Module:
        """Module that `build` makes, with its weights. float8_layers: layers that `--quantization fp8` applies to."""
        with torch.device("meta"):
            module = build(self.mesh.tensor, self.kernels)
        load_weights(
            module,
            self.info.path / component,
            checkpoint_names,
            self.device,
            self.dtype,
            self.on_bytes,
            float8=float8_layers if self.config.quantization == "fp8" else (),
            load_format=self.config.load_format,
            variant=self.config.variant,
            stems=DIFFUSERS_STEMS,
            unread_ends=tuple(
                end for weights in self.info.expected_weights.get(component, ()) for end in weights.unread
            ),
        )
        self.components.setdefault("transformer", []).append(module)
        return module

    def scheduler(self) -> SchedulerMixin:
        """Scheduler of the class that the checkpoint names."""
        values = read_object(self.info.path, SCHEDULER_PLACE)
        return SCHEDULERS[values["_class_name"]].from_config(values)
