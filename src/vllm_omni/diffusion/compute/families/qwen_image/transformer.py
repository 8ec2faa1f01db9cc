"""Qwen-Image's double-stream transformer (MMDiT, arXiv 2508.02324) on packed tokens.

Shapes: T text tokens and S image tokens over all sequences of the pack; D the width, H heads of d channels. Under
tensor parallelism a rank has P-th parts: of the heads, of the inner MLP channels and of the modulation's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.families.qwen_image.config import QwenImageConfig
from vllm_omni.diffusion.compute.layers.kernels import Kernels, Projected, TorchKernels
from vllm_omni.diffusion.compute.layers.linear import ColumnLinear, Linear, RowLinear
from vllm_omni.diffusion.compute.layers.norms import Scale, norm_modulate, rms_norm
from vllm_omni.diffusion.compute.layers.rope import axis_rotations
from vllm_omni.diffusion.compute.layers.timesteps import NUM_WAVES, timestep_waves
from vllm_omni.diffusion.compute.packing import Hidden, Pack, TokenRanges
from vllm_omni.diffusion.compute.step.modulation import Modulation, per_token
from vllm_omni.diffusion.compute.step.transformer import PackedTransformer, StepContext

EPS = 1e-6
IMAGE, TEXT = 0, 1
"""Streams of modulation."""

CHECKPOINT_NAMES: dict[str, tuple[str, ...]] = {
    "time_embedder.0": ("time_text_embed.timestep_embedder.linear_1",),
    "time_embedder.2": ("time_text_embed.timestep_embedder.linear_2",),
    "output_modulation": ("norm_out.linear",),
    "qk_norm": ("attn.norm_added_q", "attn.norm_added_k", "attn.norm_q", "attn.norm_k"),
    "image.modulation": ("img_mod.1",),
    "image.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "image.out": ("attn.to_out.0",),
    "image.up": ("img_mlp.net.0.proj",),
    "image.down": ("img_mlp.net.2",),
    "text.modulation": ("txt_mod.1",),
    "text.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "text.out": ("attn.to_add_out",),
    "text.up": ("txt_mlp.net.0.proj",),
    "text.down": ("txt_mlp.net.2",),
}
"""Our module -> modules of diffusers' checkpoint whose weights it concatenates along dim 0. Names within a block have
no `transformer_blocks.N.`. Modules that are not listed have the same name in both."""

FLOAT8_LAYERS = ("qkv", "out", "up", "down")
"""Layers of every block that `--quantization fp8` keeps in float8: two thirds of the weights. Modulation, computed
once a timestep, and the layers outside the blocks keep the model's dtype."""


class QwenImageStream(nn.Module):
    """Layers of one block for one kind of token (text or image), before and after attention."""

    def __init__(self, dim: int, tensor: Group, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.modulation = ColumnLinear(dim, 6 * dim, tensor)
        self.qkv = ColumnLinear(dim, 3 * dim, tensor)
        self.out = RowLinear(dim, dim, tensor)
        self.up = ColumnLinear(dim, 4 * dim, tensor)
        self.down = RowLinear(4 * dim, dim, tensor)

    def project(self, x: Tensor, rows: Tensor, index: Tensor | None, norms: Tensor) -> Projected:
        """Queries, keys and values of this rank's heads.

        x: [tokens, D]; rows: [rows, 6, D]; norms: [2 * d], weights of the norms of queries and keys.
        """
        shift, scale, *_ = rows.unbind(1)
        modulated = self.kernels.norm_modulate(x, shift, scale, index, EPS, self.qkv.is_float8)
        return Projected(self.qkv.product(modulated), norms, self.qkv.late_bias)

    def finish(
        self, x: Tensor, attended: Tensor, rows: Tensor, index: Tensor | None, positions: Tensor | None = None
    ) -> Tensor:
        """Output [tokens, D] of the block.

        x: [tokens, D]; attended: [tokens, D / P], or more rows, of which `positions` has each token's;
        rows: [rows, 6, D].
        """
        *_, gate, mlp_shift, mlp_scale, mlp_gate = rows.unbind(1)
        kernels = self.kernels
        if self.out.is_float8:
            out, positions = self.out.product(kernels.round_rows(attended, positions)), None
        else:
            out = self.out.product(attended)
        x = kernels.gated_add(x, out, gate, index, self.out.late_bias, positions)
        modulated = kernels.norm_modulate(x, mlp_shift, mlp_scale, index, EPS, self.up.is_float8)
        inner = kernels.gelu(self.up.product(modulated), self.up.late_bias, self.down.is_float8)
        return kernels.gated_add(x, self.down.product(inner), mlp_gate, index, self.down.late_bias)


class StreamTokens(NamedTuple):
    """Tokens of both streams, and the row of modulation of each token; None: all have the only row."""

    text: Tensor
    """[T, D]"""
    image: Tensor
    """[S, D]"""
    text_index: Tensor | None
    """int64 [T]"""
    image_index: Tensor | None
    """int64 [S]"""


class JointOrder(NamedTuple):
    """Joint order of all tokens: see `Pack.joint_order` and `Pack.joint_is_image`."""

    order: Tensor | None
    is_image: Tensor
    rotations: Tensor
    """RoPE: float32 [T + S, 1, 1, d / 2, 2]."""


class Attended(NamedTuple):
    """Output of attention for both streams."""

    text: Tensor
    """[T, D / P]; [T + S, D / P] of both streams, text first, if `image` is None."""
    image: Tensor | None = None
    """[S, D / P], or more rows, of which `image_positions` selects those of the image."""
    image_positions: Tensor | None = None
    """int64 [S]"""


class QwenImageBlock(nn.Module):
    """Joint attention of text and image between layers of their own (MMDiT).

    `before` and `after` take tuples of tensors, so that they can be compiled: see `CompiledPart`.
    """

    def __init__(self, config: QwenImageConfig, tensor: Group, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.qk_norm = Scale(4 * config.attention_head_dim)
        self.image = QwenImageStream(config.dim, tensor, kernels)
        self.text = QwenImageStream(config.dim, tensor, kernels)

    def modulate(self, condition: Tensor) -> Tensor:
        """Rows of modulation [2, timesteps, 6 * D / P], image then text. condition: [timesteps, D]."""
        return torch.stack((self.image.modulation(condition), self.text.modulation(condition)))

    def forward(self, hidden: Hidden, rows: Tensor, context: StepContext) -> Hidden:
        """rows: [2, rows, 6, D], the block's rows of modulation."""
        pack, arrangement = context.pack, context.arrangement
        tokens = StreamTokens(hidden.text, hidden.image, context.text_index, context.image_index)
        joint = JointOrder(pack.joint_order, pack.joint_is_image, arrangement.rotations)
        attended = arrangement.attend(*self.before(rows, tokens, joint)).flatten(1)
        text, image = self.after(rows, tokens, self._of_streams(attended, context))
        return Hidden(text=text, image=image)

    def _of_streams(self, attended: Tensor, context: StepContext) -> Attended:
        """Attention of both streams. attended: [T + S, D / P] in joint order."""
        pack = context.pack
        if pack.num_sequences == 1:
            return Attended(attended)
        if not self.kernels.picks_rows or pack.positions is None:
            return Attended(*pack.split(attended))
        # The image's output projection then computes the few rows of the text too: selecting the image's rows before
        # it would copy nearly all of them.
        text_positions, image_positions = pack.positions
        return Attended(attended.index_select(0, text_positions), attended, image_positions)

    def before(self, rows: Tensor, tokens: StreamTokens, joint: JointOrder) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [T + S, H / P, d] each, in joint order."""
        text_norms, image_norms = self.qk_norm.weight.chunk(2)
        streams = (
            self.text.project(tokens.text, rows[TEXT], tokens.text_index, text_norms),
            self.image.project(tokens.image, rows[IMAGE], tokens.image_index, image_norms),
        )
        return self.kernels.heads(streams, joint.order, joint.is_image, joint.rotations, EPS)

    def after(self, rows: Tensor, tokens: StreamTokens, attended: Attended) -> tuple[Tensor, Tensor]:
        """Text and image after the block: [T, D] and [S, D]."""
        text, image, positions = attended
        if image is None:
            text, image = text[: len(tokens.text)], text[len(tokens.text) :]
        return (
            self.text.finish(tokens.text, text, rows[TEXT], tokens.text_index),
            self.image.finish(tokens.image, image, rows[IMAGE], tokens.image_index, positions),
        )


class QwenImageTransformer(PackedTransformer):
    """Double-stream transformer: `embed_text` once a prompt; `embed`, the blocks and `project` at every step."""

    checkpoint_names = CHECKPOINT_NAMES
    once_layers = ("modulation",)

    def __init__(self, config: QwenImageConfig, tensor: Group, kernels: Kernels | None = None) -> None:
        """tensor: ranks that share every layer; their number divides the heads. kernels: implementation of the fused
        operations; None: plain PyTorch."""
        super().__init__()
        self.config = config
        self.tensor = tensor
        dim = config.dim
        kernels = self.kernels = kernels or TorchKernels()
        self.time_embedder = nn.Sequential(Linear(NUM_WAVES, dim), nn.SiLU(), Linear(dim, dim))
        self.txt_norm = Scale(config.joint_attention_dim)
        self.img_in = Linear(config.in_channels, dim)
        self.txt_in = Linear(config.joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            QwenImageBlock(config, tensor, kernels) for _ in range(config.num_layers)
        )
        self.output_modulation = Linear(dim, 2 * dim)
        self.proj_out = Linear(dim, config.patch_size**2 * config.out_channels)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.transformer_blocks)

    def adapted_tokens(self, path: str, pack: Pack) -> TokenRanges:
        if ".text." in path:
            return pack.text.ranges
        if path.endswith(".image.out") and self.kernels.picks_rows and pack.num_sequences > 1:
            out = cast(RowLinear, self.get_submodule(path))
            return pack.image.ranges if out.is_float8 else pack.image_in_joint  # see `QwenImageBlock._of_streams`
        return pack.image.ranges

    def run(self, hidden: Hidden, which: range, context: StepContext) -> Hidden:
        for number in which:
            hidden = self.transformer_blocks[number](hidden, context.modulation.blocks[number], context)
        return hidden

    def signal(self, hidden: Hidden, context: StepContext) -> Tensor:
        shift, scale = per_token(context.modulation.blocks[0, IMAGE, :, :2], context.image_index)
        return norm_modulate(hidden.image, shift, scale, EPS)

    def modulate(self, conditions: Sequence[float]) -> Modulation:
        """Rows of modulation of these timesteps, each in [0, 1] and already rounded to the model's dtype.

        Parts of a block: shift, scale, gate of the attention, then of the MLP. Parts of the output: scale, shift.
        Scales include the added 1.
        """
        waves = timestep_waves(torch.tensor(conditions), scale=1000).to(self.proj_out.weight.dtype)
        condition = F.silu(self.time_embedder(to_device(waves, self.proj_out.weight.device)))
        rows = torch.stack([cast(QwenImageBlock, block).modulate(condition) for block in self.transformer_blocks])
        blocks = torch.cat(self.tensor.all_gather(rows).unbind(), dim=-1).unflatten(-1, (6, -1))
        final = self.output_modulation(condition).unflatten(-1, (2, -1))
        for scale in (blocks[..., 1, :], blocks[..., 4, :], final[..., 0, :]):
            scale.add_(1)
        return Modulation(blocks, final)

    def embed_text(self, states: Tensor) -> Tensor:
        """Text [tokens, D], the same at every step. states: [tokens, joint_attention_dim] of the text encoder."""
        embedded: Tensor = self.txt_in(rms_norm(states, self.txt_norm.weight, EPS))
        return embedded

    def rotations(self, num_text_tokens: int, grids: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """RoPE of one sequence, on the CPU: float32 [text tokens, 1, 1, d / 2, 2] and [image tokens, 1, 1, d / 2, 2].

        grids: rows and columns of the picture and of each reference picture, which are frames 0, 1, ... Positions
        count from a picture's middle; text continues on the diagonal, past the edge of the largest picture.
        """
        start = max(side // 2 for grid in grids for side in grid)
        text = torch.arange(start, start + num_text_tokens)[:, None].expand(-1, 3)
        image = torch.cat(
            [
                torch.cartesian_prod(torch.tensor([frame]), *(torch.arange(side) - (side - side // 2) for side in grid))
                for frame, grid in enumerate(grids)
            ]
        )
        axes = self.config.axes_dims_rope
        return tuple(axis_rotations(p, axes)[:, None, None] for p in (text, image))  # type: ignore[return-value]  # two

    def embed(self, latents: Tensor, text: Tensor) -> Hidden:
        """Input of the first block. latents: [S, in_channels]; text: [T, D] from `embed_text`."""
        return Hidden(text=text, image=self.img_in(latents))

    def project(self, hidden: Hidden, context: StepContext, targets: Tensor | None = None) -> Tensor:
        """Velocity [velocity tokens, patch_size² * out_channels].

        targets: int64 [velocity tokens], positions of the image tokens that have one; None: all have.
        """
        image, sequence = hidden.image, context.pack.image_sequence
        # Adapters change rows by their place among all image tokens: then the targets are selected last.
        early, late = (targets, None) if context.adapters is None else (None, targets)
        if early is not None:
            image, sequence = (x.index_select(0, early) for x in (image, sequence))
        scale, shift = context.modulation.of_output(sequence)
        velocity: Tensor = self.proj_out(norm_modulate(image, shift, scale, EPS))
        return velocity if late is None else velocity.index_select(0, late)
