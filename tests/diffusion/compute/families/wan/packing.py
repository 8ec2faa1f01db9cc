"""One pack of videos through our transformer, on one rank or several, and the same videos through diffusers' class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from testbed.tiny_wan import IMAGE_DIM, IMAGE_TOKENS, TEXT_DIM
from vllm_omni.diffusion.compute.attention import create_attention
from vllm_omni.diffusion.compute.attention.sharded import PackedAttention
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.distributed.mesh import World
from vllm_omni.diffusion.compute.families.wan.config import UNREAD_ENDS, WanConfig
from vllm_omni.diffusion.compute.families.wan.transformer import (
    CHECKPOINT_NAMES,
    FLOAT8_LAYERS,
    IMAGE,
    TEXT,
    WanTransformer,
)
from vllm_omni.diffusion.compute.layers.kernels import Kernels
from vllm_omni.diffusion.compute.packing import Pack, shard_slice
from vllm_omni.diffusion.compute.step.arrangement import Arrangement
from vllm_omni.diffusion.compute.step.modulation import ModulationTable
from vllm_omni.diffusion.compute.step.transformer import StepBlocks, StepContext
from vllm_omni.diffusion.compute.weights.loading import load_weights

CPU = torch.device("cpu")
TEXT_TOKENS = 512
"""Tokens of a text with its padding; diffusers' class takes no other number beside pictures."""


@dataclass(frozen=True)
class Video:
    """Input of one sequence."""

    latents: Tensor
    """[channels, frames, height, width] of the latents."""
    text: Tensor
    """[tokens, TEXT_DIM], without padding."""
    timestep: float
    seen: Tensor | None = None
    """[tokens, IMAGE_DIM] of CLIP, of one picture or several."""
    keeps_first_frame: bool = False
    """Whether the tokens of the first frame have the timestep 0."""
    num_text_tokens: int = TEXT_TOKENS
    """Tokens of the text with padding."""

    @property
    def grid(self) -> tuple[int, int, int]:
        _, frames, height, width = self.latents.shape
        return frames, height // 2, width // 2

    @property
    def tokens(self) -> Tensor:
        """[S, channels * 4]."""
        frames, rows, columns = self.grid
        patches = self.latents.view(-1, frames, rows, 2, columns, 2).permute(1, 2, 4, 0, 3, 5)
        return patches.reshape(frames * rows * columns, -1)

    def double(self) -> Video:
        """The same in float64."""
        seen = None if self.seen is None else self.seen.double()
        return replace(self, latents=self.latents.double(), text=self.text.double(), seen=seen)


def make_videos(channels: int, timesteps: Sequence[float], num_images: int = 0, is_5b: bool = False) -> list[Video]:
    """Videos and pictures of different sizes and lengths; texts of different lengths, zero-padded."""
    shapes = [(3, 4, 8), (1, 6, 4), (2, 8, 6), (5, 2, 2)]
    videos = []
    for (frames, height, width), num_words, timestep in zip(shapes, (7, 1, 30, 512), timesteps, strict=True):
        text = torch.randn(num_words, TEXT_DIM)
        seen = torch.randn(num_images * IMAGE_TOKENS, IMAGE_DIM) if num_images else None
        latents = torch.randn(channels, frames, height, width)
        videos.append(Video(latents, text, timestep, seen, keeps_first_frame=is_5b and frames > 1))
    return videos


def load(
    path: Path,
    config: Any,
    tensor: Group | None = None,
    kernels: Kernels | None = None,
    dtype: torch.dtype = torch.float32,
    float8: bool = False,
) -> WanTransformer:
    """Our transformer with the weights in `path`. config: that of diffusers' class."""
    with torch.device("meta"):
        model = WanTransformer(WanConfig.from_dict(config), tensor or Group.alone(), kernels)
    float8_layers = FLOAT8_LAYERS if float8 else ()
    load_weights(model, path, CHECKPOINT_NAMES, CPU, dtype, float8=float8_layers, unread_ends=UNREAD_ENDS)
    return model


def context_of(
    model: WanTransformer, videos: Sequence[Video], attention: PackedAttention, parts: int = 1, index: int = 0
) -> StepContext:
    """Context of a step for shard `index` of `parts` of each video."""
    lengths = [len(video.tokens) for video in videos]
    pack = Pack.build([0] * len(videos), lengths, CPU, parts, index)
    shard = [shard_slice(length, parts, index) for length in lengths]
    rotations = torch.cat([model.rotations(video.grid)[part] for video, part in zip(videos, shard)])
    conditions = [video.timestep for video in videos]
    image_rows = None
    if any(video.keeps_first_frame for video in videos):
        conditions.append(0.0)
        rows = []
        for number, (video, part) in enumerate(zip(videos, shard)):
            own = torch.full((len(video.tokens),), number)
            own[: video.keeps_first_frame * video.grid[1] * video.grid[2]] = len(videos)
            rows.append(own[part])
        image_rows = torch.cat(rows)
    static = {TEXT: [model.text_keys(video.text, video.num_text_tokens) for video in videos]}
    if model.config.sees_image:
        static[IMAGE] = [model.image_keys(video.seen) for video in videos if video.seen is not None]
    modulation = ModulationTable(model.modulate, 2**20).rows_of(conditions)
    return StepContext(Arrangement(pack, rotations, attention, image_rows, static), modulation)


@torch.inference_mode()
def packed(model: WanTransformer, videos: Sequence[Video], which: Sequence[int] | None = None) -> list[Tensor]:
    """Velocities [S, channels * 4] of the videos, or of those that `which` selects from the whole pack."""
    attention = PackedAttention(create_attention(), Group.alone(), Group.alone())
    blocks = StepBlocks(model, context_of(model, videos, attention))
    if which is not None:
        blocks, videos = blocks.select(which), [videos[i] for i in which]
    latents = torch.cat([video.tokens for video in videos])
    hidden = model.embed(latents, latents.new_empty(0, model.config.dim))
    hidden = blocks.run(hidden, range(blocks.num_blocks))
    assert hidden.text.shape == (0, model.config.dim)
    return list(model.project(hidden, blocks.context).split([len(video.tokens) for video in videos]))


@torch.inference_mode()
def packed_on_rank(world: World, path: Path, config: Any, videos: Sequence[Video]) -> list[np.ndarray]:
    """This rank's shard of each velocity."""
    mesh = world.mesh
    parts, index = mesh.sequence.size, mesh.sequence.rank
    model = load(path, config, mesh.tensor)
    attention = PackedAttention(create_attention(), mesh.ulysses, mesh.ring)
    context = context_of(model, videos, attention, parts, index)
    latents = [video.tokens[shard_slice(len(video.tokens), parts, index)] for video in videos]
    hidden = model.embed(torch.cat(latents), torch.empty(0, model.config.dim))
    hidden = model.run(hidden, range(len(model.blocks)), context)
    return [part.numpy() for part in model.project(hidden, context).split([len(x) for x in latents])]


@torch.inference_mode()
def of_diffusers(model: Any, video: Video) -> Tensor:
    """Velocity of diffusers' class, as tokens [S, channels * 4]."""
    timestep = torch.tensor([video.timestep], dtype=video.latents.dtype)
    if video.keeps_first_frame:
        timestep = timestep.expand(1, len(video.tokens)).clone()
        timestep[:, : video.grid[1] * video.grid[2]] = 0
    seen = video.seen if video.seen is None else video.seen.view(-1, IMAGE_TOKENS, IMAGE_DIM)
    text = F.pad(video.text, (0, 0, 0, video.num_text_tokens - len(video.text)))
    (velocity,) = model(video.latents[None], timestep, text[None], seen, return_dict=False)
    return Video(velocity[0], video.text, 0.0).tokens
