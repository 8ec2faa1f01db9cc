"""A toy video family, whose transformers need more of the contract of `FlowPipeline` than the served families do.

Tokens of a video with several frames attend to themselves and to a static prefix, then to a text of another length. Two
transformers share the schedule. `ToyPipeline.alone` computes a request in plain PyTorch, without packs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from testbed.tiny_models import randomize
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo, Shares
from vllm_omni.diffusion.compute.attention.sharded import Attend
from vllm_omni.diffusion.compute.attention.static_keys import StaticKeys
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.families.component_loader import ComponentLoader
from vllm_omni.diffusion.compute.families.flow_pipeline import FlowPipeline, Forward
from vllm_omni.diffusion.compute.families.flow_state import Branch, FlowState
from vllm_omni.diffusion.compute.layers.kernels import Projected, TorchKernels
from vllm_omni.diffusion.compute.layers.rope import axis_rotations
from vllm_omni.diffusion.compute.packing import Hidden, Pack
from vllm_omni.diffusion.compute.step.arrangement import Arrangement
from vllm_omni.diffusion.compute.step.modulation import Modulation, per_token
from vllm_omni.diffusion.compute.step.pipeline import Grid, Picture
from vllm_omni.diffusion.compute.step.sampling import combine_guidance, draw_noise
from vllm_omni.diffusion.compute.step.sharding import Sharding
from vllm_omni.diffusion.compute.step.transformer import PackedTransformer, StepContext
from vllm_omni.diffusion.messages.request import DiffusionRequest

HEADS, HEAD_DIM, CHANNELS, NUM_BLOCKS, PREFIX_TOKENS = 5, 8, 3, 3, 4
WIDTH = HEADS * HEAD_DIM
SIDE, FRAME_MULTIPLE = 16, 4
BOUNDARY = 0.7
"""Timestep from which on, downwards, the second transformer computes."""


def toy_info(path: Path) -> PackedModelInfo:
    """Facts of the toy, in a folder that gets its scheduler's config."""
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(path / "scheduler")
    return PackedModelInfo(
        path=path,
        family="toy_video",
        size_multiple=SIDE,
        pixels_per_token=SIDE,
        max_prompt_tokens=100,
        count_prompt_tokens=len,
        attention_tokens=6.0 * WIDTH,
        frame_multiple=FRAME_MULTIPLE,
        default_sampling_params={"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4},
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        num_blocks=NUM_BLOCKS,
        tensor_shares=Shares({"attention heads": HEADS}, most=1),
        text_encoder_shares=Shares({"attention heads": HEADS}, most=1),
    )


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q, self.kv, self.cross_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(
        self, x: Tensor, parts: Sequence[Tensor], rotations: Tensor, attend: Attend, cross: Callable[[Tensor], Tensor]
    ) -> Tensor:
        shift, scale, gate = parts
        qkv = Projected(self.qkv(F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift), x.new_ones(2 * HEAD_DIM))
        q, k, v = TorchKernels().heads([qkv], None, None, rotations, 1e-6)
        x = x + gate * self.out(attend(q, k, v).flatten(1))
        added: Tensor = self.cross_out(cross(self.q(F.layer_norm(x, (WIDTH,))).unflatten(1, (HEADS, -1))).flatten(1))
        return x + added


class ToyTransformer(PackedTransformer):
    def __init__(self) -> None:
        super().__init__()
        self.tensor = Group.alone()
        self.embedder, self.output = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.words, self.prefix = nn.Embedding(32, WIDTH), nn.Embedding(PREFIX_TOKENS, WIDTH)
        self.modulation = nn.Linear(2, 4 * WIDTH)
        self.layers = nn.ModuleList(ToyBlock() for _ in range(NUM_BLOCKS))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)

    def modulate(self, conditions: Sequence[float]) -> Modulation:
        waves = torch.tensor(conditions)[:, None] * torch.tensor([1.0, 3.0])
        rows = 0.1 * self.modulation(torch.cos(waves)).unflatten(-1, (4, WIDTH))
        return Modulation(blocks=rows[None, None, :, :3], final=rows[:, 3:])

    def static_keys(self, states: Tensor) -> StaticKeys:
        """Keys and values of all blocks. states: [tokens, WIDTH]."""
        kv = torch.stack([block.kv(states).unflatten(-1, (2, HEADS, -1)) for block in self.layers])  # type: ignore[operator]
        keys, values = kv.unbind(2)
        return StaticKeys(keys, values)

    def text_keys(self, prompt: str) -> StaticKeys:
        return self.static_keys(self.words(torch.tensor([ord(c) % 32 for c in prompt], dtype=torch.int64)))

    def prefix_keys(self, prompt: str) -> StaticKeys:
        """As many prefix tokens as the prompt's first letter says."""
        return self.static_keys(self.prefix.weight[: 1 + len(prompt) % PREFIX_TOKENS])

    def run(self, hidden: Hidden, which: range, context: StepContext) -> Hidden:
        arrangement, x = context.arrangement, hidden.image
        parts = per_token(context.modulation.blocks[0, 0], context.image_index)
        for number in which:
            attend = partial(arrangement.attend_with_prefix, block=number, name="prefix")
            cross = partial(arrangement.attend_static, block=number, name="text")
            x = self.layers[number](x, parts, arrangement.rotations, attend, cross)
        return Hidden(hidden.text, x)

    def signal(self, hidden: Hidden, context: StepContext) -> Tensor:
        shift, scale, _ = per_token(context.modulation.blocks[0, 0], context.image_index)
        return F.layer_norm(hidden.image, (WIDTH,)) * (1 + scale) + shift

    def rotations(self, grid: Grid) -> Tensor:
        positions = torch.cartesian_prod(*(torch.arange(n) for n in grid))
        return axis_rotations(positions, (4, 2, 2))[:, None, None]

    def alone(self, latents: Tensor, timestep: float, prompt: str, grid: Grid) -> Tensor:
        """Velocity [tokens, CHANNELS] of one sequence, in plain PyTorch."""
        rows = self.modulate([timestep])
        x, text, prefix = self.embedder(latents), self.text_keys(prompt), self.prefix_keys(prompt)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(0, 1)

        for number, block in enumerate(self.layers):
            keys, values = prefix.keys[number], prefix.values[number]
            x = block(
                x,
                rows.blocks[0, 0].unbind(1),
                self.rotations(grid),
                lambda q, k, v: attend(q, torch.cat((keys, k)), torch.cat((values, v))),  # noqa: B023
                lambda q: attend(q, text.keys[number], text.values[number]) if prompt else torch.zeros_like(q),  # noqa: B023
            )
        velocity: Tensor = self.output(F.layer_norm(x, (WIDTH,)) + rows.final[:, 0])
        return velocity


@dataclass(eq=False)
class ToyState(FlowState):
    """text: without tokens."""

    keys: tuple[tuple[dict[str, StaticKeys], ...], ...] = ()
    """For each transformer and guidance branch, by name."""


class ToyPipeline(FlowPipeline[ToyState, ToyTransformer, Forward[ToyTransformer]]):
    @classmethod
    def build(cls, loader: ComponentLoader) -> ToyPipeline:
        generator_state = torch.get_rng_state()
        torch.manual_seed(0)
        transformers = [ToyTransformer(), ToyTransformer()]
        for transformer in transformers:
            randomize(transformer)
        torch.set_rng_state(generator_state)
        return cls(loader, transformers, decode, modulation_bytes=2**20)

    def encode(self, request: DiffusionRequest) -> ToyState:
        prompts = request.branch_prompts
        keys = tuple(
            tuple({"text": t.text_keys(prompt), "prefix": t.prefix_keys(prompt)} for prompt in prompts)
            for t in self.transformers
        )
        noise = draw_noise((self.num_tokens(request), CHANNELS), request.seed, torch.float32, self._device)
        text = tuple(torch.empty((0, WIDTH)) for _ in prompts)
        return self.new_state(ToyState, request, text, noise, keys=keys)

    def num_tokens(self, request: DiffusionRequest) -> int:
        frames, rows, columns = self.grid(request)
        return frames * rows * columns

    def timesteps(self, scheduler: FlowMatchEulerDiscreteScheduler) -> tuple[float, ...]:
        return tuple((scheduler.timesteps / 1000).tolist())

    def transformer_index(self, state: ToyState) -> int:
        return int(state.timesteps[state.step] <= BOUNDARY)

    def rotations(self, state: ToyState, num_text_tokens: int) -> tuple[Tensor, Tensor]:
        of_image = self.transformer.rotations(state.grid)
        return of_image[:0], of_image

    def lay_out(
        self, branches: Sequence[Branch], text: Tensor, pack: Pack, rotations: Tensor, sharding: Sharding
    ) -> Forward[ToyTransformer]:
        index = self.transformer_index(branches[0].state)
        keys = [branch.state.keys[index][branch.number] for branch in branches]
        static_keys = {name: [of_branch[name] for of_branch in keys] for name in ("text", "prefix")}
        arrangement = Arrangement(pack, rotations, self._attention, static_keys=static_keys)
        return Forward(self.transformers[index], arrangement, text)

    def embed(self, latents: Tensor, context: StepContext, forward: Forward[ToyTransformer]) -> Hidden:
        return Hidden(forward.text, forward.transformer.embedder(latents))

    def project(self, hidden: Hidden, context: StepContext, forward: Forward[ToyTransformer]) -> Tensor:
        (shift,) = context.modulation.of_output(context.pack.image_sequence)
        velocity: Tensor = forward.transformer.output(F.layer_norm(hidden.image, (WIDTH,)) + shift)
        return velocity

    def combine(self, state: ToyState, branches: Sequence[Tensor]) -> Tensor:
        if len(branches) == 1:
            return branches[0]
        return combine_guidance(branches[0], branches[1], state.request.true_cfg_scale)

    @torch.inference_mode()
    def alone(self, request: DiffusionRequest) -> Tensor:
        """Pixels of one request, step by step without packs."""
        state = self.encode(request)
        for timestep in state.timesteps:
            transformer = self.transformers[timestep <= BOUNDARY]
            branches = [transformer.alone(state.latents, timestep, p, state.grid) for p in request.branch_prompts]
            self.advance(state, branches)
        return decode([state.latents], [state.grid])[0].pixels


def decode(latents: Sequence[Tensor], grids: Sequence[Grid]) -> list[Picture]:
    """Squares of colour: a latent frame after the first one is shown FRAME_MULTIPLE times."""
    pictures = []
    for tokens, (frames, rows, columns) in zip(latents, grids):
        values = ((tokens.sigmoid() * 255).round().to(torch.uint8)).view(frames, rows, columns, 3)
        values = values.repeat_interleave(SIDE, 1).repeat_interleave(SIDE, 2)
        counts = torch.tensor([1] + [FRAME_MULTIPLE] * (frames - 1))
        pixels = values.repeat_interleave(counts, 0) if frames > 1 else values[0]
        pictures.append(Picture(pixels, tokens.isfinite().all()))
    return pictures
