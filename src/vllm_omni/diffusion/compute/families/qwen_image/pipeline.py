"""Qwen-Image, and Qwen-Image-Edit: encode -> packed denoising steps -> decode, as diffusers' QwenImagePipeline,
QwenImageEditPipeline and QwenImageEditPlusPipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from vllm_omni.diffusion.catalog.configs import read_config
from vllm_omni.diffusion.catalog.model_index import DIFFUSERS_STEMS
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.compute.attention import create_attention
from vllm_omni.diffusion.compute.attention.sharded import PackedAttention
from vllm_omni.diffusion.compute.cache import create_step_cache
from vllm_omni.diffusion.compute.cache.base import StepCache
from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.distributed.mesh import Mesh
from vllm_omni.diffusion.compute.families.qwen_image.config import TransformerConfig
from vllm_omni.diffusion.compute.families.qwen_image.edit import EditInput
from vllm_omni.diffusion.compute.families.qwen_image.text import TextEncoder
from vllm_omni.diffusion.compute.families.qwen_image.transformer import (
    CHECKPOINT_NAMES,
    FLOAT8_LAYERS,
    QwenImageTransformer,
    StepBlocks,
    StepContext,
)
from vllm_omni.diffusion.compute.families.qwen_image.vae import PictureDecoder, PictureEncoder
from vllm_omni.diffusion.compute.families.qwen_image.vision import EditEncoder
from vllm_omni.diffusion.compute.layers.kernels import create_kernels
from vllm_omni.diffusion.compute.packing import Pack
from vllm_omni.diffusion.compute.step.arrangement import Arrangement
from vllm_omni.diffusion.compute.step.compiled import CompiledBlocks
from vllm_omni.diffusion.compute.step.cuda_graphs import captured
from vllm_omni.diffusion.compute.step.flow import FlowPipeline, FlowState, Layout
from vllm_omni.diffusion.compute.step.modulation import ModulationTable
from vllm_omni.diffusion.compute.step.sampling import combine_guidance, draw_noise, pack_latents
from vllm_omni.diffusion.compute.step.schedule import make_schedule
from vllm_omni.diffusion.compute.step.sharding import Sharding
from vllm_omni.diffusion.compute.text.prompt_cache import PromptCache
from vllm_omni.diffusion.compute.weights.loading import load_autoencoder, load_weights
from vllm_omni.diffusion.data import LoadFormat, OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.inputs.images import InputImage

PROMPT_CACHE_BYTES = 256 * 2**20
REFERENCE_CACHE_BYTES = 64 * 2**20
MODULATION_BYTES = 2**30


class Instruction(NamedTuple):
    """What a text encoding depends on."""

    prompt: str
    images: tuple[InputImage, ...]

    def key(self) -> tuple[str, ...]:
        """The same without the pixels."""
        return self.prompt, *(image.digest for image in self.images)


@dataclass(eq=False)
class QwenImageState(FlowState):
    """latents: [rows * columns, in_channels]."""

    grids: tuple[tuple[int, int], ...] = ()
    """Rows and columns of tokens of the picture, then of each reference picture."""
    references: Tensor | None = None
    """Clean latents of the reference pictures, [tokens, in_channels]: further image tokens of every branch."""


@dataclass(frozen=True)
class Forward:
    """What this rank computes of them, in the order of `sharding.mine`."""

    arrangement: Arrangement
    text: Tensor
    targets: Tensor | None
    """int64 [target tokens]: the image tokens that are no reference's; None: all are not."""
    own_rows: Tensor | None
    """int64 [image tokens]: the row of modulation of each, its sequence's or the one after all sequences', which is of
    timestep 0, for references, though other ranks may hold these; None: all have their sequence's."""


class QwenImagePipeline(FlowPipeline[QwenImageState, Forward]):
    def __init__(
        self,
        transformer: QwenImageTransformer,
        encode_text: Callable[[Instruction], Tensor],
        encoder: PictureEncoder | None,
        decoder: PictureDecoder,
        scheduler: FlowMatchEulerDiscreteScheduler,
        pixels_per_token: int,
        attention: PackedAttention,
        step_cache: StepCache,
        mesh: Mesh,
    ) -> None:
        super().__init__(decoder, scheduler, pixels_per_token, mesh)
        self.transformer = transformer
        self.step_cache = step_cache
        self._attention = attention
        self._prompts = PromptCache(encode_text, PROMPT_CACHE_BYTES, Instruction.key)
        self._references: PromptCache[InputImage] | None = None
        """Latents of input pictures; None where the model takes none."""
        if encoder is not None:
            self._references = PromptCache(
                lambda image: encoder(image.reference), REFERENCE_CACHE_BYTES, lambda image: image.digest
            )
        self._modulations = ModulationTable(transformer.modulate, MODULATION_BYTES)
        self._dtype = transformer.proj_out.weight.dtype
        self._device = transformer.proj_out.weight.device

    @classmethod
    def load(
        cls,
        config: OmniDiffusionConfig,
        info: PackedModelInfo,
        device: torch.device,
        dtype: torch.dtype,
        on_bytes: Callable[[int], object],
        mesh: Mesh,
    ) -> QwenImagePipeline:
        path = info.path
        encode_text = _load_text_encoder(info, device, dtype, on_bytes, mesh, config.load_format, config.variant)
        vae = load_autoencoder(
            AutoencoderKLQwenImage, path / "vae", device, dtype, on_bytes, config.load_format, config.variant
        )
        if info.image_input is None:
            vae.encoder = torch.nn.Identity()  # frees its weights
        vae.to(device)
        values = TransformerConfig.from_dict(read_config(path, "transformer"))
        with torch.device("meta"):
            transformer = QwenImageTransformer(values, mesh.tensor, create_kernels(config.kernels))
        load_weights(
            transformer,
            path / "transformer",
            CHECKPOINT_NAMES,
            device,
            dtype,
            on_bytes,
            float8=FLOAT8_LAYERS if config.quantization == "fp8" else (),
            load_format=config.load_format,
            variant=config.variant,
            stems=DIFFUSERS_STEMS,
        )
        return cls(
            transformer=transformer,
            encode_text=encode_text,
            encoder=None if info.image_input is None else PictureEncoder(vae),
            decoder=PictureDecoder(vae, config.vae_use_slicing, config.vae_use_tiling, mesh.vae),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler"),
            pixels_per_token=info.pixels_per_token,
            attention=PackedAttention(create_attention(config.attention_backend), mesh.ulysses, mesh.ring),
            step_cache=create_step_cache(config.cache, info, mesh.rank_group),
            mesh=mesh,
        )

    @classmethod
    def gains_from_compiling(cls, config: OmniDiffusionConfig) -> bool:
        # The fused kernels leave nothing to compile.
        return config.kernels == "torch"

    def compile_blocks(self) -> CompiledBlocks:
        return self.transformer.compile_blocks()

    def encode(self, request: DiffusionRequest) -> QwenImageState:
        prompts = [request.prompt]
        if request.has_guidance:
            assert request.negative_prompt is not None
            prompts.append(request.negative_prompt)
        text = tuple(self.transformer.embed_text(self._encode_text(request, prompt)) for prompt in prompts)
        side = self._pixels_per_token
        reference_sizes = [image.reference.shape[:2] for image in request.images]
        grids = (self._grid(request), *((height // side, width // side) for height, width in reference_sizes))
        rows, columns = grids[0]
        channels = self.transformer.config.in_channels // 4
        noise = draw_noise((channels, 2 * rows, 2 * columns), request.seed, self._dtype, self._device)
        scheduler = make_schedule(self._scheduler, request, rows * columns)
        timesteps = tuple((scheduler.timesteps.to(self._dtype) / 1000).tolist())
        references = self._encode_images(request.images)
        clean = [0.0] * (references is not None and self.transformer.config.zero_cond_t)
        self._modulations.prefetch([*timesteps, *clean])
        return QwenImageState(
            request=request,
            latents=pack_latents(noise),
            sequence_lengths=tuple(sum(r * c for r, c in grids) + len(states) for states in text),
            text=text,
            grids=grids,
            references=references,
            scheduler=scheduler,
            timesteps=timesteps,
        )

    def _encode_text(self, request: DiffusionRequest, prompt: str) -> Tensor:
        """[tokens, joint_attention_dim]"""
        states = self._prompts(Instruction(prompt, request.images))
        # As in diffusers, which cuts no instruction that has pictures.
        return states if request.images else states[: request.max_sequence_length]

    def _encode_images(self, images: Sequence[InputImage]) -> Tensor | None:
        """[reference tokens, in_channels]; None for none."""
        if not images:
            return None
        assert self._references is not None, "a model that takes no input pictures was sent some"
        return torch.cat([self._references(image) for image in images])

    def predict(
        self, states: Sequence[QwenImageState], groups: Sequence[int] | None = None
    ) -> list[tuple[Tensor, ...]]:
        groups = tuple(groups) if groups is not None else (0,) * sum(len(s.text) for s in states)
        layout = self._layouts.get((*states, groups), lambda: self._lay_out(states, groups))
        velocities = iter(layout.sharding.gather(self._forward(states, layout)))
        return [tuple(next(velocities) for _ in state.text) for state in states]

    def _forward(self, states: Sequence[QwenImageState], layout: Layout[Forward]) -> Tensor:
        """Velocities [image tokens, channels] of what this rank computes."""
        sharding, forward = layout.sharding, layout.forward
        channels = self.transformer.config.in_channels
        if forward is None:
            return torch.empty((0, channels), dtype=self._dtype, device=self._device)
        branches = [state for state in states for _ in state.text]
        mine = [branches[i] for i in sharding.mine]
        timesteps = [s.timesteps[s.step] for s in mine]
        modulation = self._modulations.rows_of(timesteps + [0.0] * (forward.own_rows is not None))
        latents = torch.cat([sharding.part(_image_tokens(s)) for s in mine])
        context = StepContext(forward.arrangement, modulation, forward.own_rows, forward.targets)
        steps = [step for state in states for step in state.sequence_steps]
        hidden = self.transformer.embed(latents, forward.text)
        blocks = captured(StepBlocks(self.transformer, context), layout.captured_graphs, self.capturer)
        hidden = self.step_cache.run(hidden, blocks, [steps[i] for i in sharding.mine])
        return self.transformer.project(hidden, context)

    def _lay_out(self, states: Sequence[QwenImageState], groups: Sequence[int]) -> Layout[Forward]:
        text = [branch for state in states for branch in state.text]
        grids = [state.grids for state in states for _ in state.text]
        lengths = [sum(rows * columns for rows, columns in pictures) for pictures in grids]
        targets = [pictures[0][0] * pictures[0][1] for pictures in grids]
        sharding = Sharding(lengths, groups, self._mesh, self._device, targets)
        if not sharding.mine:
            return Layout(sharding, None)
        sizes = [(len(text[i]), grids[i]) for i in sharding.mine]
        rotations = [sharding.part(r) for size in sizes for r in self.transformer.rotations(*size)]
        pack = Pack.build(
            [n for n, _ in sizes],
            [lengths[i] for i in sharding.mine],
            self._device,
            sharding.parts,
            sharding.index,
        )
        is_reference = torch.cat([sharding.part(torch.arange(lengths[i]) >= targets[i]) for i in sharding.mine])
        has_references = bool(is_reference.any())
        own_rows = None
        if self.transformer.config.zero_cond_t and any(lengths[i] > targets[i] for i in sharding.mine):
            own_rows = pack.image_sequence.masked_fill(to_device(is_reference, self._device), pack.num_sequences)
        forward = Forward(
            # Text and image of one sequence after another: that is the joint order.
            arrangement=Arrangement(pack, to_device(torch.cat(rotations), self._device), self._attention),
            text=torch.cat([sharding.part(text[i]) for i in sharding.mine]),
            targets=to_device((~is_reference).nonzero()[:, 0], self._device) if has_references else None,
            own_rows=own_rows,
        )
        return Layout(sharding, forward)

    def combine(self, state: QwenImageState, branches: Sequence[Tensor]) -> Tensor:
        if len(branches) == 1:
            return branches[0]
        return combine_guidance(branches[0], branches[1], state.request.true_cfg_scale)


def _image_tokens(state: QwenImageState) -> Tensor:
    """[tokens of the picture and of its references, in_channels]."""
    return state.latents if state.references is None else torch.cat((state.latents, state.references))


def _load_text_encoder(
    info: PackedModelInfo,
    device: torch.device,
    dtype: torch.dtype,
    on_bytes: Callable[[int], object],
    mesh: Mesh,
    load_format: LoadFormat,
    variant: str | None,
) -> Callable[[Instruction], Tensor]:
    if info.image_input is None:
        text_encoder = TextEncoder(info.path, device, dtype, mesh.text_encoder, on_bytes, load_format, variant)
        return lambda instruction: text_encoder(instruction.prompt)
    assert isinstance(info.image_input, EditInput)
    edit_encoder = EditEncoder(
        info.path, info.image_input, device, dtype, mesh.text_encoder, on_bytes, load_format, variant
    )
    return lambda instruction: edit_encoder(*instruction)
