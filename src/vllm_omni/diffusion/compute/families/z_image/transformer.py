"""Z-Image's scalable single-stream transformer (S3-DiT, arXiv 2511.22699) on packed tokens.

Captions and pictures pass refiner layers of their own, then one stream of all tokens. Each is padded to a multiple of
32 tokens with learned tokens, which attend like the others.

Shapes: T text tokens and S image tokens over all sequences of the pack, padding included; D the width, H heads of d
channels, C the width of the timestep's embedding. Under tensor parallelism a rank has 1/P of the heads, of the
feed-forward channels and of each row of modulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.diffusion.compute.attention.sharded import Attend
from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.families.z_image.config import TIME_WIDTH, ZImageConfig
from vllm_omni.diffusion.compute.families.z_image.info import TOKEN_MULTIPLE
from vllm_omni.diffusion.compute.layers.kernels import Kernels, Projected, TorchKernels
from vllm_omni.diffusion.compute.layers.linear import ColumnLinear, Linear, RowLinear
from vllm_omni.diffusion.compute.layers.norms import Scale, rms_norm
from vllm_omni.diffusion.compute.layers.rope import axis_rotations
from vllm_omni.diffusion.compute.layers.timesteps import NUM_WAVES, timestep_waves
from vllm_omni.diffusion.compute.packing import Hidden, Pack, TokenRanges
from vllm_omni.diffusion.compute.step.modulation import Modulation, per_token
from vllm_omni.diffusion.compute.step.transformer import PackedTransformer, StepContext

QK_EPS = 1e-5
OUTPUT_EPS = 1e-6

CHECKPOINT_NAMES: dict[str, tuple[str, ...]] = {
    "time_embedder.0": ("t_embedder.mlp.0",),
    "time_embedder.2": ("t_embedder.mlp.2",),
    "image_embedder": ("all_x_embedder.2-1",),
    "caption_norm": ("cap_embedder.0",),
    "caption_embedder": ("cap_embedder.1",),
    "output_modulation": ("all_final_layer.2-1.adaLN_modulation.1",),
    "output": ("all_final_layer.2-1.linear",),
    "modulation": ("adaLN_modulation.0",),
    "qk_norm": ("attention.norm_q", "attention.norm_k"),
    "qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "out": ("attention.to_out.0",),
    "gate_up": ("feed_forward.w1", "feed_forward.w3"),
    "down": ("feed_forward.w2",),
}
"""Our module -> modules of diffusers' checkpoint whose weights it concatenates along dim 0. Names within a block have
no prefix. Modules that are not listed have the same name in both."""

FLOAT8_LAYERS = ("qkv", "out", "gate_up", "down")
"""Layers of every block, also of the refiners, that `--quantization fp8` keeps in float8: nearly all weights.
Modulation and the layers outside the blocks keep the model's dtype."""


class ZImageBlock(nn.Module):
    """Attention and feed-forward, each between two norms.

    `before` and `after` attention take plain tensors, so that they can be compiled: see `CompiledPart`.
    """

    def __init__(self, config: ZImageConfig, tensor: Group, kernels: Kernels, is_modulated: bool = True) -> None:
        super().__init__()
        self.kernels = kernels
        dim, inner = config.dim, config.inner_width
        self.eps = config.norm_eps
        if is_modulated:
            self.modulation = ColumnLinear(config.condition_width, 4 * dim, tensor)
        self.attention_norm1 = Scale(dim)
        self.attention_norm2 = Scale(dim)
        self.ffn_norm1 = Scale(dim)
        self.ffn_norm2 = Scale(dim)
        self.qkv = ColumnLinear(dim, 3 * dim, tensor, bias=False)
        self.qk_norm = Scale(2 * config.head_dim)
        self.out = RowLinear(dim, dim, tensor, bias=False)
        self.gate_up = ColumnLinear(dim, 2 * inner, tensor, bias=False)
        self.down = RowLinear(inner, dim, tensor, bias=False)

    def forward(self, x: Tensor, rows: Tensor, index: Tensor | None, rotations: Tensor, attend: Attend) -> Tensor:
        """Output [tokens, D] of the block.

        x: [tokens, D], the tokens of `attend` and `rotations`; rows: [1, rows, 4, D], scale and gate of the attention,
        then of the feed-forward; index: from `Modulation.index`.
        """
        attended = attend(*self.before(rows, x, index, rotations))
        out: Tensor = self.after(rows, x, index, attended.flatten(1))
        return out

    def before(self, rows: Tensor, x: Tensor, index: Tensor | None, rotations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [tokens, H / P, d] each."""
        (scale,) = per_token(rows[0, :, :1], index)
        qkv = self.qkv(rms_norm(x, self.attention_norm1.weight * scale, self.eps))
        return self.kernels.heads([Projected(qkv, self.qk_norm.weight)], None, None, rotations, QK_EPS)

    def after(self, rows: Tensor, x: Tensor, index: Tensor | None, attended: Tensor) -> Tensor:
        """Output [tokens, D] of the block. attended: [tokens, D / P]."""
        _, gate, _, inner_gate = rows[0].unbind(1)
        (inner_scale,) = per_token(rows[0, :, 2:3], index)
        attended = rms_norm(self.out(attended), self.attention_norm2.weight, self.eps)
        x = self.kernels.gated_add(x, attended, gate, index)
        inner_gates, inner = self.gate_up(rms_norm(x, self.ffn_norm1.weight * inner_scale, self.eps)).chunk(2, dim=-1)
        down = self.down(F.silu(inner_gates) * inner)
        return self.kernels.gated_add(x, rms_norm(down, self.ffn_norm2.weight, self.eps), inner_gate, index)


class ZImageTransformer(PackedTransformer):
    """Single-stream transformer: `refine_caption` once a prompt; `embed`, the blocks and `project` at every step."""

    checkpoint_names = CHECKPOINT_NAMES
    once_layers = ("modulation",)

    def __init__(self, config: ZImageConfig, tensor: Group, kernels: Kernels | None = None) -> None:
        """tensor: ranks that share every layer; their number divides the heads and the feed-forward channels. kernels:
        implementation of the fused operations; None: plain PyTorch."""
        super().__init__()
        kernels = self.kernels = kernels or TorchKernels()
        self.config = config
        self.tensor = tensor
        dim, condition = config.dim, config.condition_width
        self.time_embedder = nn.Sequential(Linear(NUM_WAVES, TIME_WIDTH), nn.SiLU(), Linear(TIME_WIDTH, condition))
        self.image_embedder = Linear(config.channels_per_token, dim)
        self.caption_norm = Scale(config.cap_feat_dim)
        self.caption_embedder = Linear(config.cap_feat_dim, dim)
        self.x_pad_token = nn.Parameter(torch.zeros(1, dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, dim))
        self.noise_refiner = nn.ModuleList(ZImageBlock(config, tensor, kernels) for _ in range(config.n_refiner_layers))
        self.context_refiner = nn.ModuleList(
            ZImageBlock(config, tensor, kernels, is_modulated=False) for _ in range(config.n_refiner_layers)
        )
        self.layers = nn.ModuleList(ZImageBlock(config, tensor, kernels) for _ in range(config.n_layers))
        self.output_modulation = Linear(condition, dim)
        self.output = Linear(dim, config.channels_per_token)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)

    @property
    def compilable_blocks(self) -> Sequence[nn.Module]:
        return [*self.noise_refiner, *self.layers]

    @property
    def once_blocks(self) -> Sequence[nn.Module]:
        return list(self.context_refiner)

    def adapted_tokens(self, path: str, pack: Pack) -> TokenRanges:
        return (pack.joint if path.startswith("layers.") else pack.image).ranges

    def run(self, hidden: Hidden, which: range, context: StepContext) -> Hidden:
        pack, arrangement, modulation = context.pack, context.arrangement, context.modulation
        x, sequence = pack.join(hidden.text, hidden.image), pack.join(pack.text_sequence, pack.image_sequence)
        index = modulation.index(sequence)
        for number in which:
            rows = modulation.blocks[len(self.noise_refiner) + number]
            x = self.layers[number](x, rows, index, arrangement.rotations, arrangement.attend)
        return Hidden(*pack.split(x))

    def signal(self, hidden: Hidden, context: StepContext) -> Tensor:
        layer, rows = cast(ZImageBlock, self.layers[0]), context.modulation.blocks[len(self.noise_refiner), 0]
        (scale,) = per_token(rows[:, :1], context.image_index)
        return rms_norm(hidden.image, layer.attention_norm1.weight * scale, layer.eps)

    def modulate(self, conditions: Sequence[float]) -> Modulation:
        """Rows of modulation of these timesteps, from 0 (noise) to 1.

        Layers are those of the noise refiner, then those of the stream. Parts of a layer: scale and gate of the
        attention, then of the feed-forward. Part of the output: a scale. Scales include the added 1.
        """
        waves = timestep_waves(torch.tensor(conditions, dtype=torch.float32) * self.config.t_scale)
        condition = self.time_embedder(to_device(waves.to(self.output.weight.dtype), self.output.weight.device))
        layers = chain(self.noise_refiner, self.layers)
        rows = torch.stack([cast(ZImageBlock, layer).modulation(condition) for layer in layers])
        parts = torch.cat(self.tensor.all_gather(rows).unbind(), dim=-1).unflatten(-1, (4, -1))
        scales, gates = 1 + parts[..., 0::2, :], parts[..., 1::2, :].tanh()
        return Modulation(
            blocks=torch.stack((scales, gates), dim=-2).flatten(-3, -2)[:, None],
            final=(1 + self.output_modulation(F.silu(condition)))[:, None],
        )

    def refine_caption(self, states: Tensor, attend: Attend) -> Tensor:
        """Caption [tokens with padding, D] as the stream takes it, the same at every step.

        states: [tokens, cap_feat_dim] of the text encoder. attend: attention over the tokens with padding.
        """
        x: Tensor = self.caption_embedder(rms_norm(states, self.caption_norm.weight, self.config.norm_eps))
        x = torch.cat((x, self.cap_pad_token.expand(padded_length(len(x)) - len(x), -1)))
        rotations = to_device(self._caption_rotations(len(x)), x.device)
        unmodulated = x.new_ones(1, 1, 4, x.shape[1])
        for layer in self.context_refiner:
            x = layer(x, unmodulated, None, rotations, attend)
        return x

    def rotations(self, num_text_tokens: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """RoPE of one sequence, on the CPU: float32 [text tokens, 1, 1, d / 2, 2] and [image tokens, 1, 1, d / 2, 2],
        padding included.

        Text counts from 1 along the first axis, and the picture is the frame after it; its padding is at the origin.
        """
        rows, columns = grid
        frame = torch.tensor([num_text_tokens + 1])
        image = torch.cartesian_prod(frame, torch.arange(rows), torch.arange(columns))
        image = F.pad(image, (0, 0, 0, padded_length(len(image)) - len(image)))
        return self._caption_rotations(num_text_tokens), self._rotations(image)

    def _caption_rotations(self, num_tokens: int) -> Tensor:
        return self._rotations(F.pad(torch.arange(1, num_tokens + 1)[:, None], (0, 2)))

    def _rotations(self, positions: Tensor) -> Tensor:
        config = self.config
        return axis_rotations(positions, config.axes_dims, config.rope_theta, torch.float64)[:, None, None]

    def embed(
        self, latents: Tensor, text: Tensor, context: StepContext, is_padding: Tensor, attend_images: Attend
    ) -> Hidden:
        """Input of the stream. latents: [S, channels_per_token], any values in the padding; text: [T, D] from
        `refine_caption`; is_padding: bool [S, 1]; attend_images: attention over each sequence's image tokens alone."""
        image = torch.where(is_padding, self.x_pad_token, self.image_embedder(latents))
        _, rotations = context.pack.split(context.arrangement.rotations)
        for layer, rows in zip(self.noise_refiner, context.modulation.blocks):
            image = layer(image, rows, context.image_index, rotations, attend_images)
        return Hidden(text, image)

    def project(self, hidden: Hidden, context: StepContext) -> Tensor:
        """Direction from noise to picture, [S, channels_per_token]."""
        (scale,) = context.modulation.of_output(context.pack.image_sequence)
        image = F.layer_norm(hidden.image, hidden.image.shape[-1:], eps=OUTPUT_EPS) * scale
        direction: Tensor = self.output(image)
        return direction


def padded_length(num_tokens: int) -> int:
    """The next multiple of TOKEN_MULTIPLE."""
    return -(-num_tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
