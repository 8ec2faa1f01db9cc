"""Z-Image and Z-Image-Turbo: the computation of diffusers' ZImagePipeline on packed tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from vllm_omni.diffusion.catalog.configs import read_config
from vllm_omni.diffusion.compute.attention.sharded import Attend, PackedAttention
from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.families.component_loader import ComponentLoader
from vllm_omni.diffusion.compute.families.flow_pipeline import FlowPipeline, Forward
from vllm_omni.diffusion.compute.families.flow_state import Branch, FlowState
from vllm_omni.diffusion.compute.families.z_image.config import ZImageConfig
from vllm_omni.diffusion.compute.families.z_image.text import ZImageTextEncoder
from vllm_omni.diffusion.compute.families.z_image.transformer import (
    CHECKPOINT_NAMES,
    FLOAT8_LAYERS,
    ZImageTransformer,
    padded_length,
)
from vllm_omni.diffusion.compute.families.z_image.vae import ZImageDecoder
from vllm_omni.diffusion.compute.offload.turns import TEXT_ENCODER
from vllm_omni.diffusion.compute.packing import Hidden, Pack
from vllm_omni.diffusion.compute.step.arrangement import Arrangement
from vllm_omni.diffusion.compute.step.sampling import combine_bounded, draw_noise, pack_latents
from vllm_omni.diffusion.compute.step.sharding import Sharding
from vllm_omni.diffusion.compute.step.transformer import StepContext
from vllm_omni.diffusion.messages.request import DiffusionRequest

PROMPT_CACHE_BYTES = 256 * 2**20
MODULATION_BYTES = 2**28


@dataclass(eq=False)
class ZImageState(FlowState):
    """State of a Z-Image request. latents: float32 [rows * columns, channels * 4], whatever the model's dtype.

    text: refined and padded. timesteps: elapsed time of the schedule, from 0 (noise) to 1.
    """

    @property
    def num_image_tokens(self) -> int:
        return padded_length(self.num_tokens)

    @property
    def num_velocity_tokens(self) -> int:
        return self.num_image_tokens

    @property
    def branches(self) -> tuple[Tensor, ...]:
        """Texts of the branches that the next step computes: the first alone after `cfg_truncation` ended guidance."""
        has_ended = self.timesteps[self.step] > self.request.cfg_truncation
        return self.text[:1] if has_ended else self.text


@dataclass(frozen=True)
class ZImageForward(Forward[ZImageTransformer]):
    """Tensors that the steps of some sequences share."""

    attend_images: Attend
    """Attention over the image tokens of each sequence alone."""
    is_padding: Tensor
    """bool [S, 1]: the image tokens that pad a picture."""


class ZImagePipeline(FlowPipeline[ZImageState, ZImageTransformer, ZImageForward]):
    adapter_converter = "ZImageLoraLoaderMixin"
    kept_bytes = MODULATION_BYTES + PROMPT_CACHE_BYTES

    def __init__(
        self,
        loader: ComponentLoader,
        transformer: ZImageTransformer,
        decoder: ZImageDecoder,
        text_encoder: Callable[[str], Tensor],
    ) -> None:
        super().__init__(loader, [transformer], decoder, MODULATION_BYTES)
        self._prompts = loader.prompt_cache(self.turns.during(TEXT_ENCODER, text_encoder), PROMPT_CACHE_BYTES)
        self._caption_attention = PackedAttention(self._backend, Group.alone(), Group.alone())

    @classmethod
    def build(cls, loader: ComponentLoader) -> ZImagePipeline:
        text_encoder = loader.text_encoder(ZImageTextEncoder)
        vae = loader.autoencoder(AutoencoderKL)
        config = ZImageConfig.from_dict(read_config(loader.info.path, "transformer"))
        transformer = loader.transformer(partial(ZImageTransformer, config), CHECKPOINT_NAMES, FLOAT8_LAYERS)
        slicing, tiling = loader.config.vae_use_slicing, loader.config.vae_use_tiling
        vae.to(loader.device)
        decoder = ZImageDecoder(vae, slicing, tiling, loader.mesh.vae, loader.kernels, loader.tile_choice)
        return cls(loader, transformer, decoder, text_encoder)

    @property
    def early_encodes(self) -> Sequence[Callable[[DiffusionRequest], object]]:
        return (self._encode_texts,)

    def encode(self, request: DiffusionRequest) -> ZImageState:
        states = self._encode_texts(request)
        with self.transformer_turn(), self.adapted(request):
            text = tuple(map(self._refined, states))
        _, rows, columns = self.grid(request)
        channels = self.transformer.config.in_channels
        noise = draw_noise((channels, 2 * rows, 2 * columns), request.seed, torch.float32, self._device)
        return self.new_state(ZImageState, request, text, pack_latents(noise, channels_last=True))

    def _encode_texts(self, request: DiffusionRequest) -> list[Tensor]:
        """Output of the text encoder for each branch: [tokens, caption channels]."""
        return [self._prompts(prompt)[: request.max_sequence_length] for prompt in request.branch_prompts]

    def timesteps(self, scheduler: Any) -> tuple[float, ...]:
        return tuple(((1000 - scheduler.timesteps) / 1000).tolist())

    def _refined(self, states: Tensor) -> Tensor:
        """Caption as the blocks take it, [tokens, D]. It is short, so every rank computes all of it."""
        attend = self._caption_attention.over(Pack.build([padded_length(len(states))], [0], self._device))
        return self.transformer.refine_caption(states, attend)

    def image_tokens(self, state: ZImageState) -> Tensor:
        """Latents with rows of zeros as padding; the transformer puts its learned tokens there."""
        return F.pad(state.latents, (0, 0, 0, state.num_image_tokens - state.num_tokens))

    def rotations(self, state: ZImageState, num_text_tokens: int) -> tuple[Tensor, Tensor]:
        return self.transformer.rotations(num_text_tokens, state.grid[1:])

    def lay_out(
        self, branches: Sequence[Branch], text: Tensor, pack: Pack, rotations: Tensor, sharding: Sharding
    ) -> ZImageForward:
        states = [branch.state for branch in branches]
        lengths = [state.num_image_tokens for state in states]
        images = Pack.build([0] * len(states), lengths, self._device, sharding.parts, sharding.index)
        is_padding = [sharding.part(torch.arange(n) >= state.num_tokens) for n, state in zip(lengths, states)]
        return ZImageForward(
            self.transformer,
            Arrangement(pack, rotations, self._attention),
            text,
            attend_images=self._attention.over(images),
            is_padding=to_device(torch.cat(is_padding)[:, None], self._device),
        )

    def embed(self, latents: Tensor, context: StepContext, forward: ZImageForward) -> Hidden:
        return forward.transformer.embed(latents, forward.text, context, forward.is_padding, forward.attend_images)

    def project(self, hidden: Hidden, context: StepContext, forward: ZImageForward) -> Tensor:
        # The model predicts the direction from noise to picture; the schedule's velocity is the opposite.
        return -forward.transformer.project(hidden, context)

    def combine(self, state: ZImageState, branches: Sequence[Tensor]) -> Tensor:
        if len(branches) == 1:
            return branches[0].float()
        request = state.request
        positive, negative = (branch.float() for branch in branches)
        return combine_bounded(positive, negative, request.true_cfg_scale, request.cfg_normalization)
