"""Z-Image and Z-Image-Turbo: encode -> packed denoising steps -> decode, as diffusers' ZImagePipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from vllm_omni.diffusion.attention import create_attention
from vllm_omni.diffusion.attention.sharded import Attend, PackedAttention
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.groups import Group
from vllm_omni.diffusion.distributed.mesh import Mesh
from vllm_omni.diffusion.models.base import BasePipeline, RequestState
from vllm_omni.diffusion.models.configs import read_config
from vllm_omni.diffusion.models.loading import load_weights, num_bytes
from vllm_omni.diffusion.models.modulation import ModulationTable
from vllm_omni.diffusion.models.prompt_cache import PromptCache
from vllm_omni.diffusion.models.schedule import make_schedule
from vllm_omni.diffusion.models.sharding import Sharding
from vllm_omni.diffusion.models.z_image.text import TextEncoder
from vllm_omni.diffusion.models.z_image.transformer import (
    CHECKPOINT_NAMES,
    StepContext,
    TransformerConfig,
    ZImageTransformer,
    filled_up,
)
from vllm_omni.diffusion.models.z_image.vae import PictureDecoder
from vllm_omni.diffusion.packing import MembershipCache, Pack
from vllm_omni.diffusion.registry import ModelInfo
from vllm_omni.diffusion.request import DiffusionRequest
from vllm_omni.diffusion.sampling import combine_truncating, draw_noise, pack_latents, predict_clean

PROMPT_CACHE_BYTES = 256 * 2**20
MODULATION_BYTES = 2**28


@dataclass(eq=False)
class ZImageState(RequestState):
    """latents: float32 [rows * columns, channels * 4], whatever the model's dtype."""

    text: tuple[Tensor, ...] = ()
    """A branch each (conditional, then unconditional), refined and filled up: [tokens, D]."""
    grid: tuple[int, int] = (0, 0)
    """Rows and columns of tokens."""
    scheduler: Any = None
    """diffusers' scheduler, of this request alone."""
    timesteps: tuple[float, ...] = ()
    """What the transformer is told at each step: the schedule's time that has passed, in [0, 1]."""

    @property
    def num_tokens(self) -> int:
        """Of the picture alone."""
        rows, columns = self.grid
        return rows * columns

    @property
    def branches(self) -> tuple[Tensor, ...]:
        """The texts of this step's guidance branches: the conditional one alone where guidance has ended."""
        has_ended = self.timesteps[self.step] > self.request.cfg_truncation
        return self.text[:1] if has_ended else self.text


@dataclass(frozen=True)
class Branch:
    """A sequence of one step."""

    state: ZImageState
    text: Tensor
    group: int
    """The rank group that computes it."""


@dataclass(frozen=True)
class Layout:
    """What a membership of sequences shares over its steps."""

    sharding: Sharding
    forward: Forward | None
    """None when this rank's group computes none of them."""


@dataclass(frozen=True)
class Forward:
    """What this rank computes of them, in the order of `sharding.mine`; see `StepContext`."""

    pack: Pack
    rotations: Tensor
    sequence: Tensor
    attend: Attend
    attend_images: Attend
    is_filling: Tensor
    text: Tensor


class Pipeline(BasePipeline[ZImageState]):
    def __init__(
        self,
        transformer: ZImageTransformer,
        text_encoder: Callable[[str], Tensor],
        decoder: PictureDecoder,
        scheduler: FlowMatchEulerDiscreteScheduler,
        pixels_per_token: int,
        attention_backend: str | None,
        mesh: Mesh,
    ) -> None:
        self.transformer = transformer
        self.decoder = decoder
        self._scheduler = scheduler
        self._pixels_per_token = pixels_per_token
        backend = create_attention(attention_backend)
        self._attention = PackedAttention(backend, mesh.ulysses, mesh.ring)
        self._caption_attention = PackedAttention(backend, Group.alone(), Group.alone())
        self._mesh = mesh
        self._prompts = PromptCache(text_encoder, PROMPT_CACHE_BYTES)
        self._modulations = ModulationTable(transformer.modulate, MODULATION_BYTES)
        self._layouts: MembershipCache[Layout] = MembershipCache()
        self._dtype = transformer.output.weight.dtype
        self._device = transformer.output.weight.device

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
        vae = AutoencoderKL.from_pretrained(path / "vae", dtype=dtype, use_safetensors=True)
        on_bytes(num_bytes(path / "vae"))
        with torch.device("meta"):
            values = TransformerConfig.from_dict(read_config(path, "transformer"))
            transformer = ZImageTransformer(values, mesh.tensor)
        load_weights(transformer, path / "transformer", CHECKPOINT_NAMES, device, dtype, on_bytes)
        return cls(
            transformer=transformer,
            text_encoder=text_encoder,
            decoder=PictureDecoder(
                vae.to(device).eval().requires_grad_(False), config.vae_use_slicing, config.vae_use_tiling, mesh.vae
            ),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler"),
            pixels_per_token=info.pixels_per_token,
            attention_backend=config.attention_backend,
            mesh=mesh,
        )

    def encode(self, request: DiffusionRequest) -> ZImageState:
        prompts = [request.prompt]
        if request.has_guidance:
            assert request.negative_prompt is not None
            prompts.append(request.negative_prompt)
        text = tuple(self._refined(self._prompts(prompt)[: request.max_sequence_length]) for prompt in prompts)
        rows, columns = (side // self._pixels_per_token for side in (request.height, request.width))
        channels = self.transformer.config.in_channels
        noise = draw_noise((channels, 2 * rows, 2 * columns), request.seed, torch.float32, self._device)
        scheduler = make_schedule(self._scheduler, request, rows * columns)
        timesteps = tuple(((1000 - scheduler.timesteps) / 1000).tolist())
        self._modulations.prefetch(timesteps)
        return ZImageState(
            request=request,
            latents=pack_latents(noise, channels_last=True),
            sequence_lengths=tuple(filled_up(rows * columns) + len(states) for states in text),
            text=text,
            grid=(rows, columns),
            scheduler=scheduler,
            timesteps=timesteps,
        )

    def _refined(self, states: Tensor) -> Tensor:
        """A caption as the stream takes it. It is short, so ranks that share a sequence do not share this."""
        attend = self._caption_attention.over(Pack.build([filled_up(len(states))], [0], self._device))
        return self.transformer.refine_caption(states, attend)

    def predict(self, states: Sequence[ZImageState], groups: Sequence[int] | None = None) -> list[tuple[Tensor, ...]]:
        groups_left = iter(groups if groups is not None else [0] * sum(len(s.text) for s in states))
        branches: list[Branch] = []
        for state in states:
            groups_of_state = [next(groups_left) for _ in state.text]
            branches += [Branch(state, text, g) for text, g in zip(state.branches, groups_of_state)]
        key = (*(branch.state for branch in branches), tuple(branch.group for branch in branches))
        layout = self._layouts.get(key, lambda: self._lay_out(branches))
        # The model says what leads from noise to picture; the schedule's velocity goes the other way.
        velocities = iter(layout.sharding.gather(-self._forward(branches, layout)))
        return [tuple(next(velocities)[: state.num_tokens] for _ in state.branches) for state in states]

    def _forward(self, branches: Sequence[Branch], layout: Layout) -> Tensor:
        """[image tokens, channels * 4] of what this rank computes."""
        sharding, forward = layout.sharding, layout.forward
        if forward is None:
            channels = self.transformer.config.channels_per_token
            return torch.empty((0, channels), dtype=self._dtype, device=self._device)
        mine = [branches[i].state for i in sharding.mine]
        latents = torch.cat([sharding.part(_fill_up(state.latents)) for state in mine]).to(self._dtype)
        context = StepContext(
            pack=forward.pack,
            rotations=forward.rotations,
            sequence=forward.sequence,
            attend=forward.attend,
            attend_images=forward.attend_images,
            is_filling=forward.is_filling,
            modulation=self._modulations.rows_of([state.timesteps[state.step] for state in mine]),
        )
        return self.transformer(latents, forward.text, context)  # type: ignore[no-any-return]  # nn.Module's call

    def _lay_out(self, branches: Sequence[Branch]) -> Layout:
        lengths = [filled_up(branch.state.num_tokens) for branch in branches]
        sharding = Sharding(lengths, [branch.group for branch in branches], self._mesh, self._device)
        if not sharding.mine:
            return Layout(sharding, None)
        mine = [branches[i] for i in sharding.mine]
        image_lengths = [lengths[i] for i in sharding.mine]
        rotations = [r for b in mine for r in self.transformer.rotations(len(b.text), b.state.grid)]
        filling = [torch.arange(n) >= branch.state.num_tokens for n, branch in zip(image_lengths, mine)]
        pack, images = (
            Pack.build(text_lengths, image_lengths, self._device, sharding.parts, sharding.index)
            for text_lengths in ([len(branch.text) for branch in mine], [0] * len(mine))
        )
        forward = Forward(
            pack=pack,
            # Text and image of one sequence after another: that is the joint order.
            rotations=torch.cat([sharding.part(r) for r in rotations]).to(self._device),
            sequence=pack.join(pack.text_sequence, pack.image_sequence),
            attend=self._attention.over(pack),
            attend_images=self._attention.over(images),
            is_filling=torch.cat([sharding.part(f) for f in filling])[:, None].to(self._device),
            text=torch.cat([sharding.part(branch.text) for branch in mine]),
        )
        return Layout(sharding, forward)

    def combine(self, state: ZImageState, branches: Sequence[Tensor]) -> Tensor:
        if len(branches) == 1:
            return branches[0].float()
        request = state.request
        positive, negative = (branch.float() for branch in branches)
        return combine_truncating(positive, negative, request.true_cfg_scale, request.cfg_normalization)

    def advance(self, state: ZImageState, velocity: Tensor) -> None:
        timestep = state.scheduler.timesteps[state.step]
        state.latents = state.scheduler.step(velocity, timestep, state.latents, return_dict=False)[0]
        state.step += 1

    def predict_clean(self, state: ZImageState, velocity: Tensor) -> Tensor:
        return predict_clean(state.latents, velocity, float(state.scheduler.sigmas[state.step]))

    def decode(self, requests: Sequence[DiffusionRequest], latents: Sequence[Tensor]) -> list[np.ndarray]:
        side = self._pixels_per_token
        return self.decoder(latents, [(r.height // side, r.width // side) for r in requests])

    def forget(self, state: ZImageState) -> None:
        self._layouts.forget(state)


def _fill_up(latents: Tensor) -> Tensor:
    """Rows of zeros up to what the transformer computes on, which puts its own tokens there."""
    return F.pad(latents, (0, 0, 0, filled_up(len(latents)) - len(latents)))
