"""Wan's video transformer (arXiv 2503.20314) on packed tokens.

A token is one latent frame of a patch of 2x2 latent pixels. Blocks hold no text tokens: they attend to keys and values
of the text, which stay the same from step to step.

Shapes: S image tokens over all sequences of the pack; D the width, H heads of d channels. Under tensor parallelism a
rank has 1/P of the heads and of the feed-forward channels. A token's channels are ordered channel, row, column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.diffusion.compute.attention.static_keys import StaticKeys
from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.families.wan.config import PATCH_PIXELS, PATCH_SIZE, ROPE_THETA, WanConfig
from vllm_omni.diffusion.compute.layers.kernels import Kernels, Projected, TorchKernels
from vllm_omni.diffusion.compute.layers.linear import ColumnLinear, Float32Linear, Linear, RowLinear
from vllm_omni.diffusion.compute.layers.low_rank import LayerChange
from vllm_omni.diffusion.compute.layers.norms import AffineNorm, ColumnScale, norm_modulate, shared_squares
from vllm_omni.diffusion.compute.layers.rope import axis_rotations
from vllm_omni.diffusion.compute.layers.rounding import Rows
from vllm_omni.diffusion.compute.layers.timesteps import timestep_waves
from vllm_omni.diffusion.compute.packing import Hidden
from vllm_omni.diffusion.compute.step.modulation import Modulation, per_token
from vllm_omni.diffusion.compute.step.transformer import PackedTransformer, StepContext

TEXT, IMAGE = "text", "image"
"""Names of the static keys that the blocks attend to; IMAGE only where `WanConfig.sees_image`."""
IMAGE_NORM_EPS = 1e-5

CHECKPOINT_NAMES: dict[str, tuple[str, ...]] = {
    "time_embedder.0": ("condition_embedder.time_embedder.linear_1",),
    "time_embedder.2": ("condition_embedder.time_embedder.linear_2",),
    "modulation": ("condition_embedder.time_proj",),
    "text_embedder.0": ("condition_embedder.text_embedder.linear_1",),
    "text_embedder.2": ("condition_embedder.text_embedder.linear_2",),
    "image_embedder": ("condition_embedder.image_embedder",),
    "image_embedder.norm1": ("condition_embedder.image_embedder.norm1",),
    "image_embedder.norm2": ("condition_embedder.image_embedder.norm2",),
    "image_embedder.ff.0": ("condition_embedder.image_embedder.ff.net.0.proj",),
    "image_embedder.ff.2": ("condition_embedder.image_embedder.ff.net.2",),
    "qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "qk_norm": ("attn1.norm_q", "attn1.norm_k"),
    "out": ("attn1.to_out.0",),
    "cross_norm": ("norm2",),
    "cross_q": ("attn2.to_q",),
    "cross_q_norm": ("attn2.norm_q",),
    "text_kv": ("attn2.to_k", "attn2.to_v"),
    "text_k_norm": ("attn2.norm_k",),
    "image_kv": ("attn2.add_k_proj", "attn2.add_v_proj"),
    "image_k_norm": ("attn2.norm_added_k",),
    "cross_out": ("attn2.to_out.0",),
    "up": ("ffn.net.0.proj",),
    "down": ("ffn.net.2",),
}
"""Our module -> modules of diffusers' checkpoint whose weights it concatenates along dim 0. Names within a block have
no `blocks.N.`. Modules that are not listed have the same name in both."""
TRAINER_NAMES = {
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn1.to_": "self_attn.",
    "attn2.to_": "cross_attn.",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "proj_out": "head.head",
}
"""See `PackedTransformer.trainer_names`."""

FLOAT8_LAYERS = ("qkv", "out", "cross_q", "cross_out", "up", "down")
"""Layers of every block that `--quantization fp8` keeps in float8: those that run at every step."""


class PatchEmbedding(nn.Module):
    """Linear layer on tokens [S, in_channels * 4] with the weight of a convolution, [D, in_channels, 1, 2, 2]."""

    change: LayerChange | None = None

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, in_channels, 1, PATCH_SIZE, PATCH_SIZE))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        linear = F.linear if self.change is None else self.change.linear
        return linear(tokens, self.weight.flatten(1), self.bias)


class ImageEmbedder(nn.Module):
    """CLIP's embeddings of the input pictures in the width of the blocks: [tokens, image_dim] -> [tokens, D]."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        assert config.image_dim is not None
        self.norm1 = AffineNorm(config.image_dim)
        self.norm2 = AffineNorm(config.dim)
        self.ff = nn.Sequential(
            Linear(config.image_dim, config.image_dim), nn.GELU(), Linear(config.image_dim, config.dim)
        )
        self.pos_embed: nn.Parameter | None = None
        if config.pos_embed_seq_len:
            self.pos_embed = nn.Parameter(torch.zeros(1, config.pos_embed_seq_len, config.image_dim))

    def forward(self, embeddings: Tensor) -> Tensor:
        x = embeddings if self.pos_embed is None else embeddings + self.pos_embed[0]
        x = self.ff(norm_modulate(x, self.norm1.bias[None], self.norm1.weight[None], IMAGE_NORM_EPS))
        return norm_modulate(x, self.norm2.bias[None], self.norm2.weight[None], IMAGE_NORM_EPS)


class WanBlock(nn.Module):
    """Self-attention, attention to the text (and to an input picture), feed-forward.

    `before`, `between` and `after` take plain tensors, so that they can be compiled: see `CompiledPart`. They run
    before the self-attention, between it and the attention to the text, and after that.
    """

    float32_parameters: ClassVar[tuple[str, ...]] = ("scale_shift_table",)

    def __init__(self, config: WanConfig, tensor: Group, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.tensor = tensor
        self.eps = config.eps
        self.head_dim = config.attention_head_dim
        dim = config.dim
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, dim))
        self.qkv = ColumnLinear(dim, 3 * dim, tensor)
        self.qk_norm = ColumnScale(2 * dim, tensor)
        self.out = RowLinear(dim, dim, tensor)
        self.cross_norm = AffineNorm(dim)
        self.cross_q = ColumnLinear(dim, dim, tensor)
        self.cross_q_norm = ColumnScale(dim, tensor)
        self.text_kv = ColumnLinear(dim, 2 * dim, tensor)
        self.text_k_norm = ColumnScale(dim, tensor)
        self.has_image = config.sees_image
        if self.has_image:
            self.image_kv = ColumnLinear(dim, 2 * dim, tensor)
            self.image_k_norm = ColumnScale(dim, tensor)
        self.cross_out = RowLinear(dim, dim, tensor)
        self.up = ColumnLinear(dim, config.ffn_dim, tensor)
        self.down = RowLinear(config.ffn_dim, dim, tensor)

    def forward(self, x: Tensor, number: int, context: StepContext) -> Tensor:
        """Output [S, D] of the block. x: [S, D]; number: of the block."""
        rows, index, arrangement = context.modulation.blocks[number], context.image_index, context.arrangement
        attended = arrangement.attend(*self.before(rows, x, index, arrangement.rotations))
        x, q = self.between(rows, x, index, attended.flatten(1))
        seen = arrangement.attend_static(q, number, TEXT)
        if self.has_image:
            seen = seen + arrangement.attend_static(q, number, IMAGE)
        out: Tensor = self.after(rows, x, index, seen.flatten(1))
        return out

    def before(self, rows: Tensor, x: Tensor, index: Tensor | None, rotations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the self-attention, [S, H / P, d] each.

        rows: [1, rows, 6, D], shift, scale and gate of the self-attention, then of the feed-forward; index: int64 [S],
        the row of each token, None: row 0; rotations: float32 [S, 1, 1, d / 2, 2].
        """
        shift, scale, *_ = rows[0].unbind(1)
        modulated = self.kernels.norm_modulate(x, shift, scale, index, self.eps, self.qkv.is_float8)
        qkv, bias = self._projected(self.qkv, modulated)
        squares = shared_squares(qkv.unflatten(1, (3, -1))[:, :2], self.tensor)
        return self.kernels.wide_heads(Projected(qkv, self.qk_norm.weight, bias), rotations, self.eps, squares)

    def between(self, rows: Tensor, x: Tensor, index: Tensor | None, attended: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [S, D] after the self-attention, and queries [S, H / P, d] for the text. attended: [S, D / P]."""
        gate = rows[0, :, 2]
        out = self.out.product(self._rounded(attended, self.out.is_float8))
        x = self.kernels.gated_add(x, out, gate, index, self.out.late_bias)
        norm = self.cross_norm
        normed = self.kernels.norm_modulate(
            x, norm.bias[None], norm.weight[None], None, self.eps, self.cross_q.is_float8
        )
        q, bias = self._projected(self.cross_q, normed)
        q = self.kernels.wide_norm(q, self.cross_q_norm.weight, bias, self.eps, shared_squares(q, self.tensor))
        return x, q.unflatten(1, (-1, self.head_dim))

    def after(self, rows: Tensor, x: Tensor, index: Tensor | None, seen: Tensor) -> Tensor:
        """Output [S, D] of the block. seen: [S, D / P], attention to the text, and to an input picture added."""
        *_, shift, scale, gate = rows[0].unbind(1)
        kernels = self.kernels
        out = self.cross_out.product(self._rounded(seen, self.cross_out.is_float8))
        x = x + (out if self.cross_out.late_bias is None else out + self.cross_out.late_bias)
        modulated = kernels.norm_modulate(x, shift, scale, index, self.eps, self.up.is_float8)
        inner = kernels.gelu(self.up.product(modulated), self.up.late_bias, self.down.is_float8)
        return kernels.gated_add(x, self.down.product(inner), gate, index, self.down.late_bias)

    def static_keys(self, name: str, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [tokens, H / P, d] of the tokens `states` [tokens, D] for the attention `name`."""
        layer, norm = (self.text_kv, self.text_k_norm) if name == TEXT else (self.image_kv, self.image_k_norm)
        keys, values = layer(states).chunk(2, dim=-1)
        keys = self.kernels.wide_norm(keys, norm.weight, None, self.eps, shared_squares(keys, self.tensor))
        return keys.unflatten(-1, (-1, self.head_dim)), values.unflatten(-1, (-1, self.head_dim))

    def _projected(self, layer: ColumnLinear, x: Rows) -> tuple[Tensor, Tensor | None]:
        """Product of `layer`, and its late bias; with tensor parallelism the bias is added, for `shared_squares`."""
        y, bias = layer.product(x), layer.late_bias
        return (y, bias) if bias is None or self.tensor.size == 1 else (y + bias, None)

    def _rounded(self, x: Tensor, is_float8: bool) -> Rows:
        return self.kernels.round_rows(x) if is_float8 else x


class WanTransformer(PackedTransformer):
    """Video transformer: `text_keys` and `image_keys` once a request; `embed`, blocks and `project` at every step."""

    float32_parameters: ClassVar[tuple[str, ...]] = ("scale_shift_table",)
    checkpoint_names = CHECKPOINT_NAMES
    trainer_names = TRAINER_NAMES
    once_layers = ("text_kv", "image_kv")

    def __init__(self, config: WanConfig, tensor: Group, kernels: Kernels | None = None) -> None:
        """tensor: ranks that share every layer; their number divides the heads and the feed-forward channels. kernels:
        implementation of the fused operations; None: plain PyTorch."""
        super().__init__()
        self.config = config
        self.tensor = tensor
        self.kernels = kernels or TorchKernels()
        dim = config.dim
        self.patch_embedding = PatchEmbedding(config.in_channels, dim)
        self.time_embedder = nn.Sequential(Float32Linear(config.freq_dim, dim), nn.SiLU(), Float32Linear(dim, dim))
        self.modulation = ColumnLinear(dim, 6 * dim, tensor)
        self.text_embedder = nn.Sequential(Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), Linear(dim, dim))
        if config.sees_image:
            self.image_embedder = ImageEmbedder(config)
        # Not by an assignment: the checkpoint's name is also that of the property.
        self._modules["blocks"] = nn.ModuleList(
            WanBlock(config, tensor, self.kernels) for _ in range(config.num_layers)
        )
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, dim))
        self.proj_out = Linear(dim, PATCH_PIXELS * config.num_output_channels)

    @property
    def blocks(self) -> Sequence[WanBlock]:
        return cast(Sequence[WanBlock], self._modules["blocks"])

    @property
    def compiled_parts(self) -> tuple[str, ...]:
        return ("before", "between", "after") if self.tensor.size == 1 else ()

    def run(self, hidden: Hidden, which: range, context: StepContext) -> Hidden:
        x = hidden.image
        for number in which:
            x = self.blocks[number](x, number, context)
        return Hidden(hidden.text, x)

    def signal(self, hidden: Hidden, context: StepContext) -> Tensor:
        shift, scale = per_token(context.modulation.blocks[0, 0, :, :2], context.image_index)
        return norm_modulate(hidden.image, shift, scale, self.config.eps)

    def modulate(self, conditions: Sequence[float]) -> Modulation:
        """Rows of modulation, in float32 at least, of these timesteps, from 0 to 1000 (noise).

        Parts of a block: shift, scale, gate of the self-attention, then of the feed-forward. Parts of the output:
        shift, scale. Scales include the added 1.
        """
        weight = self.proj_out.weight
        waves = timestep_waves(torch.tensor(conditions, dtype=torch.float32), num_waves=self.config.freq_dim)
        waves = to_device(waves.to(self.scale_shift_table.dtype), weight.device)
        condition = self.time_embedder(waves).to(weight.dtype)
        shares = self.tensor.all_gather(self.modulation(F.silu(condition)))
        rows = torch.cat(shares.unbind(), dim=-1).unflatten(-1, (6, -1))
        blocks = torch.stack([block.scale_shift_table + rows for block in self.blocks])
        final = self.scale_shift_table + condition[:, None]
        for scale in (blocks[..., 1, :], blocks[..., 4, :], final[..., 1, :]):
            scale.add_(1)
        return Modulation(blocks[:, None], final)

    def text_keys(self, states: Tensor, num_tokens: int) -> StaticKeys:
        """Keys and values of a text for all blocks. states: [tokens, text_dim], without padding; num_tokens: with it.

        The text is padded with zeros, and blocks attend to the padding.
        """
        num_padding = num_tokens - len(states)
        padded = F.pad(states, (0, 0, 0, min(num_padding, 1)))
        return self._static_keys(TEXT, self.text_embedder(padded), max(num_padding, 1))

    def image_keys(self, embeddings: Tensor) -> StaticKeys:
        """Keys and values of the input pictures for all blocks. embeddings: [tokens, image_dim] of CLIP, one picture
        after the other."""
        return self._static_keys(IMAGE, self.image_embedder(embeddings))

    def _static_keys(self, name: str, states: Tensor, last_count: int = 1) -> StaticKeys:
        heads = self.config.num_attention_heads // self.tensor.size
        shape = (len(self.blocks), len(states), heads, self.config.attention_head_dim)
        static = StaticKeys(states.new_empty(shape), states.new_empty(shape), last_count)
        for block, *targets in zip(self.blocks, static.keys, static.values):
            for target, made in zip(targets, block.static_keys(name, states)):
                target.copy_(made)
        return static

    def rotations(self, grid: tuple[int, int, int]) -> Tensor:
        """RoPE of one sequence, on the CPU: float32 [S, 1, 1, d / 2, 2]. grid: frames, rows and columns of tokens."""
        # Angles are computed once for each frame, row and column, and not for each of 100,000 tokens.
        parts = []
        for axis, (length, dim) in enumerate(zip(grid, self.config.axes_dims)):
            of_axis = axis_rotations(torch.arange(length)[:, None], (dim,), ROPE_THETA, torch.float64)
            shape = [1, 1, 1, *of_axis.shape[1:]]
            shape[axis] = length
            parts.append(of_axis.view(shape).expand(*grid, -1, -1))
        return torch.cat(parts, dim=3).flatten(0, 2)[:, None, None]

    def embed(self, latents: Tensor, text: Tensor) -> Hidden:
        """Input of the first block. latents: [S, in_channels * 4]; text: [0, D], because blocks have no text tokens."""
        return Hidden(text, self.patch_embedding(latents))

    def project(self, hidden: Hidden, context: StepContext) -> Tensor:
        """Velocity [S, out_channels * 4]."""
        shift, scale = context.modulation.final.unbind(1)
        normed = self.kernels.norm_modulate(hidden.image, shift, scale, context.image_index, self.config.eps)
        assert isinstance(normed, Tensor)
        # The checkpoint's order within a token is row, column, channel.
        velocity: Tensor = self.proj_out(normed).unflatten(1, (PATCH_PIXELS, -1)).transpose(1, 2).flatten(1)
        return velocity
