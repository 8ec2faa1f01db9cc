"""Z-Image and Z-Image-Turbo: encode -> packed denoising steps -> decode, as diffusers' ZImagePipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from vllm_omni.diffusion.catalog.configs import read_config
from vllm_omni.diffusion.catalog.model_index import DIFFUSERS_STEMS
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.compute.attention import create_attention
from vllm_omni.diffusion.compute.attention.sharded import Attend, PackedAttention
from vllm_omni.diffusion.compute.cache import create_step_cache
from vllm_omni.diffusion.compute.cache.base import SequenceStep, StepCache
from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.distributed.mesh import Mesh
from vllm_omni.diffusion.compute.families.z_image.config import TransformerConfig
from vllm_omni.diffusion.compute.families.z_image.text import TextEncoder
from vllm_omni.diffusion.compute.families.z_image.transformer import (
    CHECKPOINT_NAMES,
    FLOAT8_LAYERS,
    StepBlocks,
    StepContext,
    ZImageTransformer,
    filled_up,
)
from vllm_omni.diffusion.compute.families.z_image.vae import PictureDecoder
from vllm_omni.diffusion.compute.layers.kernels import create_kernels
from vllm_omni.diffusion.compute.packing import Pack
from vllm_omni.diffusion.compute.step.arrangement import Arrangement
from vllm_omni.diffusion.compute.step.compiled import CompiledBlocks
from vllm_omni.diffusion.compute.step.cuda_graphs import captured
from vllm_omni.diffusion.compute.step.flow import FlowPipeline, FlowState, Layout
from vllm_omni.diffusion.compute.step.modulation import ModulationTable
from vllm_omni.diffusion.compute.step.sampling import combine_bounded, draw_noise, pack_latents
from vllm_omni.diffusion.compute.step.schedule import make_schedule
from vllm_omni.diffusion.compute.step.sharding import Sharding
from vllm_omni.diffusion.compute.text.prompt_cache import PromptCache
from vllm_omni.diffusion.compute.weights.loading import load_autoencoder, load_weights
from vllm_omni.diffusion.data import AttentionBackendName, OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest

PROMPT_CACHE_BYTES = 256 * 2**20
MODULATION_BYTES = 2**28


@dataclass(eq=False)
class ZImageState(FlowState):
    """latents: float32 [rows * columns, channels * 4], whatever the model's dtype.

    text: refined and filled up; timesteps: the part of the schedule's time that has passed.
    """

    grid: tuple[int, int] = (0, 0)
    """Rows and columns of tokens."""

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
class Forward:
    arrangement: Arrangement
    attend_images: Attend
    is_filling: Tensor
    text: Tensor


class ZImagePipeline(FlowPipeline[ZImageState, Forward]):
    def __init__(
        self,
        transformer: ZImageTransformer,
        text_encoder: Callable[[str], Tensor],
        decoder: PictureDecoder,
        scheduler: FlowMatchEulerDiscreteScheduler,
        pixels_per_token: int,
        attention_backend: AttentionBackendName | None,
        step_cache: StepCache,
        mesh: Mesh,
    ) -> None:
        super().__init__(decoder, scheduler, pixels_per_token, mesh)
        self.transformer = transformer
        self.step_cache = step_cache
        backend = create_attention(attention_backend)
        self._attention = PackedAttention(backend, mesh.ulysses, mesh.ring)
        self._caption_attention = PackedAttention(backend, Group.alone(), Group.alone())
        self._prompts = PromptCache(text_encoder, PROMPT_CACHE_BYTES)
        self._modulations = ModulationTable(transformer.modulate, MODULATION_BYTES)
        self._dtype = transformer.output.weight.dtype
        self._device = transformer.output.weight.device

    @classmethod
    def load(
        cls,
        config: OmniDiffusionConfig,
        info: PackedModelInfo,
        device: torch.device,
        dtype: torch.dtype,
        on_bytes: Callable[[int], object],
        mesh: Mesh,
    ) -> ZImagePipeline:
        path = info.path
        text_encoder = TextEncoder(path, device, dtype, mesh.text_encoder, on_bytes, config.load_format, config.variant)
        vae = load_autoencoder(AutoencoderKL, path / "vae", device, dtype, on_bytes, config.load_format, config.variant)
        kernels = create_kernels(config.kernels)
        with torch.device("meta"):
            values = TransformerConfig.from_dict(read_config(path, "transformer"))
            transformer = ZImageTransformer(values, mesh.tensor, kernels)
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
            text_encoder=text_encoder,
            decoder=PictureDecoder(vae.to(device), config.vae_use_slicing, config.vae_use_tiling, mesh.vae, kernels),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler"),
            pixels_per_token=info.pixels_per_token,
            attention_backend=config.attention_backend,
            step_cache=create_step_cache(config.cache, info, mesh.rank_group),
            mesh=mesh,
        )

    def compile_blocks(self) -> CompiledBlocks:
        return self.transformer.compile_blocks()

    def encode(self, request: DiffusionRequest) -> ZImageState:
        prompts = [request.prompt]
        if request.has_guidance:
            assert request.negative_prompt is not None
            prompts.append(request.negative_prompt)
        text = tuple(self._refined(self._prompts(prompt)[: request.max_sequence_length]) for prompt in prompts)
        rows, columns = self._grid(request)
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
        steps = [step for state in states for step, _ in zip(state.sequence_steps, state.branches)]
        velocities = iter(layout.sharding.gather(-self._forward(branches, steps, layout)))
        return [tuple(next(velocities)[: state.num_tokens] for _ in state.branches) for state in states]

    def _forward(self, branches: Sequence[Branch], steps: Sequence[SequenceStep], layout: Layout[Forward]) -> Tensor:
        """[image tokens, channels * 4] of what this rank computes."""
        sharding, forward = layout.sharding, layout.forward
        if forward is None:
            channels = self.transformer.config.channels_per_token
            return torch.empty((0, channels), dtype=self._dtype, device=self._device)
        mine = [branches[i].state for i in sharding.mine]
        latents = torch.cat([sharding.part(_fill_up(state.latents)) for state in mine]).to(self._dtype)
        modulation = self._modulations.rows_of([state.timesteps[state.step] for state in mine])
        context = StepContext(forward.arrangement, forward.attend_images, forward.is_filling, modulation)
        hidden = self.transformer.embed(latents, forward.text, context)
        blocks = captured(StepBlocks(self.transformer, context), layout.captured_graphs, self.capturer)
        hidden = self.step_cache.run(hidden, blocks, [steps[i] for i in sharding.mine])
        return self.transformer.project(hidden, context)

    def _lay_out(self, branches: Sequence[Branch]) -> Layout[Forward]:
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
        # Text and image of one sequence after another: that is the joint order.
        joint_rotations = to_device(torch.cat([sharding.part(r) for r in rotations]), self._device)
        forward = Forward(
            arrangement=Arrangement(pack, joint_rotations, self._attention),
            attend_images=self._attention.over(images),
            is_filling=to_device(torch.cat([sharding.part(f) for f in filling])[:, None], self._device),
            text=torch.cat([sharding.part(branch.text) for branch in mine]),
        )
        return Layout(sharding, forward)

    def combine(self, state: ZImageState, branches: Sequence[Tensor]) -> Tensor:
        if len(branches) == 1:
            return branches[0].float()
        request = state.request
        positive, negative = (branch.float() for branch in branches)
        return combine_bounded(positive, negative, request.true_cfg_scale, request.cfg_normalization)


def _fill_up(latents: Tensor) -> Tensor:
    """Rows of zeros up to what the transformer computes on, which puts its own tokens there."""
    return F.pad(latents, (0, 0, 0, filled_up(len(latents)) - len(latents)))
