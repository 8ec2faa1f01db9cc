"""Loading of the components of a packed family's model folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, TypeVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor, nn

from vllm_omni.diffusion.catalog.configs import EULER, SCHEDULER_PLACE, UNIPC
from vllm_omni.diffusion.catalog.folder_files import read_object
from vllm_omni.diffusion.catalog.model_index import DIFFUSERS_STEMS
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.compute.device.device import why_no_float8
from vllm_omni.diffusion.compute.device.host_runs import NewRun, SharedRuns
from vllm_omni.diffusion.compute.device.transfers import is_host
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.distributed.mesh import Mesh
from vllm_omni.diffusion.compute.layers.kernels import Kernels, create_kernels
from vllm_omni.diffusion.compute.layers.rounding import FLOAT8
from vllm_omni.diffusion.compute.offload.gathered import WeightSharding
from vllm_omni.diffusion.compute.offload.layer_offload import LayerOffload, StreamedLayers, encoder_layers
from vllm_omni.diffusion.compute.offload.turns import IMAGE_ENCODER, TEXT_ENCODER, TRANSFORMERS, VAE, Turns
from vllm_omni.diffusion.compute.step.transformer import PackedTransformer
from vllm_omni.diffusion.compute.step.unipc import FlowUniPC
from vllm_omni.diffusion.compute.text.prompt_cache import Input, PromptCache
from vllm_omni.diffusion.compute.vae.tile_choice import TileChoice
from vllm_omni.diffusion.compute.weights.loading import Allocate, load_autoencoder, load_weights
from vllm_omni.diffusion.compute.weights.reader import WeightReader
from vllm_omni.diffusion.compute.weights.transformer_file import (
    Float8Choice,
    TransformerSource,
    load_transformer_file,
)
from vllm_omni.diffusion.data import TRANSFORMER_FILES, OmniDiffusionConfig, flag_of

logger = logging.getLogger(__name__)

ROW_DTYPES = {"int8": torch.int8, "fp8": FLOAT8}
"""Value of `text_encoder_quantization` -> dtype of the weights."""
SCHEDULERS = {EULER: FlowMatchEulerDiscreteScheduler, UNIPC: FlowUniPC}
"""Class that a scheduler's config names -> class of the scheduler; `catalog.configs` refuses others."""
Loaded = TypeVar("Loaded")
Module = TypeVar("Module", bound=PackedTransformer)


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

    prompt_caches: list[PromptCache[Any]] = field(default_factory=list)
    """Caches that `prompt_cache` has made, and those of encoders."""

    @cached_property
    def single_files(self) -> dict[str, TransformerSource]:
        """Single files with weights of transformers, by component; their headers are checked when first asked for.

        Raises ConfigError for a file that does not fit the model.
        """
        return {
            component: TransformerSource.open(
                file,
                flag_of(TRANSFORMER_FILES[component]),
                component,
                self.info.transformer_class,
                self.info.expected_weights[component][0],
            )
            for component, file in self.config.transformer_files.items()
        }

    @cached_property
    def kernels(self) -> Kernels:
        return create_kernels(self.config.kernels)

    @cached_property
    def layer_offload(self) -> LayerOffload | None:
        """Layers of the components that stream from host memory or other ranks; None: all are whole on the device."""
        config = self.config
        if config.weight_sharding:
            return WeightSharding(self.device, self.mesh.weights)
        if not config.enable_layerwise_offload:
            return None
        return LayerOffload(self.device, config.resident_layers, self._host_memory)

    @cached_property
    def _host_memory(self) -> NewRun | None:
        """Host memory of weights that rest there: one copy for all ranks that keep the same; None: of this rank."""
        mesh, device = self.mesh, self.device
        if mesh.control.size == 1 or device.type == "meta":
            return None
        # One region for each component and each share of it that a rank may keep.
        shares = dict.fromkeys(TRANSFORMERS, (mesh.tensor.rank, mesh.tensor.size))
        shares |= {TEXT_ENCODER: (mesh.text_encoder.rank, mesh.text_encoder.size), IMAGE_ENCODER: (0, 1), VAE: (0, 1)}
        starts = dict(zip(shares, accumulate((size for _, size in shares.values()), initial=0)))
        num_regions = sum(size for _, size in shares.values())
        try:
            runs = SharedRuns.of_ranks(mesh.control.agree, mesh.control.rank, num_regions, device)
        except OSError as error:
            logger.warning("offload: each rank keeps its own copy of the weights in host memory: %s", error)
            return None
        return lambda component, num_bytes: runs.run(starts[component] + shares[component][0], num_bytes)

    @cached_property
    def turns(self) -> Turns:
        """Turns of the components on the device, with `--enable-cpu-offload`."""
        # On the meta device, where only sizes are wanted, nothing rests.
        is_on = self.config.enable_cpu_offload and self.device.type != "meta"
        return Turns(self.device, is_on, new_run=self._host_memory if is_on else None)

    def _allocate(self, component: str, layers: Callable[[Any], StreamedLayers]) -> Allocate | None:
        """Callback that puts the weights of a component's module where they rest; None: on the device."""
        if (offload := self.layer_offload) is not None:
            return lambda module: offload.place(module, layers(module), component)
        return self.turns.rest(component)

    @cached_property
    def tile_choice(self) -> TileChoice:
        """Choice of tiles for decodes and encodes of the VAE; it takes effect by `PackedPipeline.watch_memory`."""
        return TileChoice(partial(self.info.decode_bytes, tile=False, dtype_bytes=self.dtype.itemsize))

    def text_encoder(self, cls: Callable[..., Loaded], *arguments: object) -> Loaded:
        """`cls` for the model folder; `arguments` follow the folder in its call."""
        row_dtype = None if (name := self.config.text_encoder_quantization) is None else ROW_DTYPES[name]
        reader = self._reader(self.dtype, TEXT_ENCODER, row_dtype)
        return cls(self.info.path, *arguments, reader, self.mesh.text_encoder)

    def image_encoder(self, cls: Callable[..., Loaded], dtype: torch.dtype) -> Loaded:
        """`cls` for the model folder: the encoder of the input pictures that the transformer sees."""
        return cls(self.info.path, self._reader(dtype, IMAGE_ENCODER))

    def _reader(self, dtype: torch.dtype, component: str, row_dtype: torch.dtype | None = None) -> WeightReader:
        modules, config = self.components.setdefault(component, []), self.config
        allocate = self._allocate(component, encoder_layers)
        return WeightReader(
            self.device, dtype, self.on_bytes, config.load_format, config.variant, modules, allocate, row_dtype
        )

    def prompt_cache(
        self,
        encode: Callable[[Input], Tensor],
        max_bytes: int,
        key_of: Callable[[Input], Hashable] = lambda value: value,
    ) -> PromptCache[Input]:
        """A new `PromptCache`, which is emptied when the worker sleeps."""
        cache = PromptCache(encode, max_bytes, key_of)
        self.prompt_caches.append(cache)
        return cache

    def autoencoder(self, cls: type[Any], dtype: torch.dtype | None = None) -> Any:
        """diffusers' VAE class `cls`, on the CPU. dtype: None for the model's."""
        path, config = self.info.path / "vae", self.config
        dtype = dtype or self.dtype
        vae = load_autoencoder(cls, path, self.device, dtype, self.on_bytes, config.load_format, config.variant)
        self.components.setdefault(VAE, []).append(vae)
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
        allocate = self._allocate(component, lambda its: its.streamed_layers)
        if (source := self.single_files.get(component)) is not None:
            float8 = self._float8_choice(float8_layers)
            load_transformer_file(
                module, source, checkpoint_names, self.device, self.dtype, self.on_bytes, float8, allocate
            )
        else:
            self._load_folder(module, checkpoint_names, float8_layers, component, allocate)
        self.components.setdefault("transformer", []).append(module)
        return module

    def _float8_choice(self, layers: tuple[str, ...]) -> Float8Choice:
        rounds_all = self.config.quantization == "fp8"
        # A CPU would gain nothing: it multiplies in float32.
        multiplies = not is_host(self.device) and why_no_float8(self.device, self.dtype) is None
        return Float8Choice(layers, rounds_all, keeps_stored=rounds_all or multiplies)

    def _load_folder(
        self,
        module: nn.Module,
        checkpoint_names: Mapping[str, tuple[str, ...]],
        float8_layers: tuple[str, ...],
        component: str,
        allocate: Allocate | None,
    ) -> None:
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
            allocate=allocate,
        )

    def scheduler(self) -> SchedulerMixin:
        """Scheduler of the class that the checkpoint names."""
        values = read_object(self.info.path, SCHEDULER_PLACE)
        return SCHEDULERS[values["_class_name"]].from_config(values)
