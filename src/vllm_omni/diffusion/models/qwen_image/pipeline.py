"""Text to image with Qwen-Image: encode -> packed denoising steps -> decode, as diffusers' QwenImagePipeline."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from vllm_omni.diffusion.attention import create_attention
from vllm_omni.diffusion.attention.sharded import PackedAttention
from vllm_omni.diffusion.cache import create_step_cache
from vllm_omni.diffusion.cache.base import StepCache
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.mesh import Mesh
from vllm_omni.diffusion.models.arrangement import Arrangement
from vllm_omni.diffusion.models.flow import FlowPipeline, FlowState, Layout
from vllm_omni.diffusion.models.loading import load_weights, num_bytes
from vllm_omni.diffusion.models.modulation import ModulationTable
from vllm_omni.diffusion.models.prompt_cache import PromptCache
from vllm_omni.diffusion.models.qwen_image.text import TextEncoder
from vllm_omni.diffusion.models.qwen_image.transformer import (
    CHECKPOINT_NAMES,
    QwenImageTransformer,
    StepBlocks,
    StepContext,
    TransformerConfig,
)
from vllm_omni.diffusion.models.qwen_image.vae import PictureDecoder
from vllm_omni.diffusion.models.schedule import make_schedule
from vllm_omni.diffusion.models.sharding import Sharding
from vllm_omni.diffusion.packing import Pack
from vllm_omni.diffusion.registry import ModelInfo
from vllm_omni.diffusion.request import DiffusionRequest
from vllm_omni.diffusion.sampling import (
    combine_guidance,
    draw_noise,
    pack_latents,
)

PROMPT_CACHE_BYTES = 256 * 2**20
MODULATION_BYTES = 2**30


@dataclass(eq=False)
class QwenImageState(FlowState):
    """latents: [rows * columns, in_channels]."""

    grid: tuple[int, int] = (0, 0)
    """Rows and columns of tokens."""


@dataclass(frozen=True)
class Forward:
    """What this rank computes of them, in the order of `sharding.mine`."""

    arrangement: Arrangement
    text: Tensor


class Pipeline(FlowPipeline[QwenImageState, Forward]):
    def __init__(
        self,
        transformer: QwenImageTransformer,
        text_encoder: Callable[[str], Tensor],
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
        self._prompts = PromptCache(text_encoder, PROMPT_CACHE_BYTES)
        self._modulations = ModulationTable(transformer.modulate, MODULATION_BYTES)
        self._dtype = transformer.proj_out.weight.dtype
        self._device = transformer.proj_out.weight.device

    @classmethod
    def load(
        cls,
        config: OmniDiffusionConfig,
        info: ModelInfo,
        device: torch.device,
        dtype: torch.dtype,
        on_bytes: Callable[[int], object],
        mesh: Mesh,
    ) -> Pipeline:
        path = info.path
        text_encoder = TextEncoder(path, device, dtype, mesh.text_encoder, on_bytes)
        vae = AutoencoderKLQwenImage.from_pretrained(path / "vae", dtype=dtype, use_safetensors=True)
        on_bytes(num_bytes(path / "vae"))
        values = json.loads((path / "transformer" / "config.json").read_text())
        with torch.device("meta"):
            transformer = QwenImageTransformer(TransformerConfig.from_dict(values), mesh.tensor)
        load_weights(transformer, path / "transformer", CHECKPOINT_NAMES, device, dtype, on_bytes)
        return cls(
            transformer=transformer,
            text_encoder=text_encoder,
            decoder=PictureDecoder(
                vae.to(device).eval().requires_grad_(False),
                config.vae_use_slicing,
                config.vae_use_tiling,
                mesh.vae,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler"),
            pixels_per_token=info.pixels_per_token,
            attention=PackedAttention(create_attention(config.attention_backend), mesh.ulysses, mesh.ring),
            step_cache=create_step_cache(config.cache, info, mesh.rank_group),
            mesh=mesh,
        )

    def encode(self, request: DiffusionRequest) -> QwenImageState:
        prompts = [request.prompt]
        if request.has_guidance:
            assert request.negative_prompt is not None
            prompts.append(request.negative_prompt)
        text = tuple(
            self.transformer.embed_text(self._prompts(prompt)[: request.max_sequence_length]) for prompt in prompts
        )
        rows, columns = self._grid(request)
        channels = self.transformer.config.in_channels // 4
        noise = draw_noise((channels, 2 * rows, 2 * columns), request.seed, self._dtype, self._device)
        scheduler = make_schedule(self._scheduler, request, rows * columns)
        timesteps = tuple((scheduler.timesteps.to(self._dtype) / 1000).tolist())
        self._modulations.prefetch(timesteps)
        return QwenImageState(
            request=request,
            latents=pack_latents(noise),
            sequence_lengths=tuple(rows * columns + len(states) for states in text),
            text=text,
            grid=(rows, columns),
            scheduler=scheduler,
            timesteps=timesteps,
        )

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
        modulation = self._modulations.rows_of([s.timesteps[s.step] for s in mine])
        latents = torch.cat([sharding.part(s.latents) for s in mine])
        context = StepContext(forward.arrangement, modulation)
        steps = [step for state in states for step in state.sequence_steps]
        hidden = self.transformer.embed(latents, forward.text)
        blocks = StepBlocks(self.transformer, context)
        hidden = self.step_cache.run(hidden, blocks, [steps[i] for i in sharding.mine])
        return self.transformer.project(hidden, context)

    def _lay_out(self, states: Sequence[QwenImageState], groups: Sequence[int]) -> Layout[Forward]:
        text = [branch for state in states for branch in state.text]
        grids = [state.grid for state in states for _ in state.text]
        sharding = Sharding([rows * columns for rows, columns in grids], groups, self._mesh, self._device)
        if not sharding.mine:
            return Layout(sharding, None)
        sizes = [(len(text[i]), grids[i]) for i in sharding.mine]
        rotations = [sharding.part(r) for size in sizes for r in self.transformer.rotations(*size)]
        pack = Pack.build(
            [n for n, _ in sizes],
            [rows * columns for _, (rows, columns) in sizes],
            self._device,
            sharding.parts,
            sharding.index,
        )
        # Text and image of one sequence after another: that is the joint order.
        arrangement = Arrangement(pack, torch.cat(rotations).to(self._device), self._attention)
        return Layout(sharding, Forward(arrangement, torch.cat([sharding.part(text[i]) for i in sharding.mine])))

    def combine(self, state: QwenImageState, branches: Sequence[Tensor]) -> Tensor:
        if len(branches) == 1:
            return branches[0]
        return combine_guidance(branches[0], branches[1], state.request.true_cfg_scale)
