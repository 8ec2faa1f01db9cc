"""Sizes of Z-Image's parts, and the weights that follow from them (no torch here)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.diffusion.catalog.configs import TIMESTEP_CHANNELS, from_values
from vllm_omni.diffusion.catalog.decode_memory import picture_bytes
from vllm_omni.diffusion.catalog.expected_weights import ExpectedWeights, LayerList, linear_shapes
from vllm_omni.errors import ConfigError

PATCH_SIZE = 2
"""Side of a token in latent pixels."""
CONDITION_WIDTH = 256
TIME_WIDTH = 1024


@dataclass(frozen=True)
class ZImageConfig:
    """Keys of transformer/config.json that the architecture depends on."""

    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1024, 512, 512)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ZImageConfig:
        """Read a parsed config.json. Raises ConfigError for values of wrong types or that contradict each other."""
        config = from_values(cls, values, "transformer/config.json")
        if sum(config.axes_dims) * config.n_heads != config.dim:
            raise ConfigError(
                f"transformer/config.json: axes_dims {config.axes_dims} of {config.n_heads} heads must add up to dim, "
                f"{config.dim}"
            )
        return config

    @property
    def head_dim(self) -> int:
        return sum(self.axes_dims)

    @property
    def inner_width(self) -> int:
        """Channels inside a feed-forward layer."""
        return inner_width(self.dim)

    @property
    def condition_width(self) -> int:
        """Channels of the timestep's embedding."""
        return min(self.dim, CONDITION_WIDTH)

    @property
    def channels_per_token(self) -> int:
        return PATCH_SIZE**2 * self.in_channels

    def peak_channels(self, ranks: int, rounded: float) -> float:
        """Channels that live at once for each token at the peak of a step: see `PackedModelInfo.peak_channels`."""
        dim, inner = self.dim, self.inner_width / ranks
        # All the time: latents, input of the stream, input of this block.
        always = self.channels_per_token + 2 * dim
        # Before attention: output of the qkv product; queries, keys and values.
        before = 6 * dim / ranks
        # After it: attention's output, its normed projection, the sum with the block's input.
        after = dim / ranks + 2 * dim
        # Inside the MLP: gate and up product, SiLU of the gate, their product; then gate and up product, down product,
        # its norm before and after the weight, and the block's output.
        mlp = max(4 * inner, 2 * inner + 4 * dim)
        if rounded < 1:  # their product is rounded to float8 in float32, of which it is a copy in a narrower dtype
            in_float32 = 4 * rounded
            mlp = max(mlp, (3 + in_float32 + (in_float32 if in_float32 > 1 else 0) + rounded) * inner)
        return always + max(before, after + mlp)

    def expected_weights(self) -> ExpectedWeights:
        """All weights, by their names in diffusers."""
        dim, inner, condition = self.dim, self.inner_width, self.condition_width
        plain: dict[str, tuple[int, ...]] = {
            f"{name}.weight": (dim,) for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
        }
        plain |= {f"attention.norm_{name}.weight": (self.head_dim,) for name in "qk"}
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            plain |= linear_shapes(f"attention.{name}", dim, dim, has_bias=False)
        for name, shape in (("w1", (inner, dim)), ("w2", (dim, inner)), ("w3", (inner, dim))):
            plain |= linear_shapes(f"feed_forward.{name}", *shape, has_bias=False)
        modulated = plain | linear_shapes("adaLN_modulation.0", 4 * dim, condition)
        shapes = (
            linear_shapes("t_embedder.mlp.0", TIME_WIDTH, TIMESTEP_CHANNELS)
            | linear_shapes("t_embedder.mlp.2", condition, TIME_WIDTH)
            | linear_shapes("all_x_embedder.2-1", dim, self.channels_per_token)
            | linear_shapes("cap_embedder.1", dim, self.cap_feat_dim)
            | linear_shapes("all_final_layer.2-1.adaLN_modulation.1", dim, condition)
            | linear_shapes("all_final_layer.2-1.linear", self.channels_per_token, dim)
            | {"cap_embedder.0.weight": (self.cap_feat_dim,), "x_pad_token": (1, dim), "cap_pad_token": (1, dim)}
        )
        layers = {
            "noise_refiner": LayerList("n_refiner_layers", self.n_refiner_layers, modulated),
            "context_refiner": LayerList("n_refiner_layers", self.n_refiner_layers, plain),
            "layers": LayerList("n_layers", self.n_layers, modulated),
        }
        return ExpectedWeights(shapes, layers, is_complete=True)


@dataclass(frozen=True)
class ZImageVaeConfig:
    """Keys of vae/config.json that pictures and latents depend on."""

    shift_factor: float
    scaling_factor: float
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    sample_size: int = 32
    """Side of a tile in pixels, when the VAE's tiling is on."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ZImageVaeConfig:
        """Read a parsed config.json. Raises ConfigError for values of wrong types."""
        return from_values(cls, values, "vae/config.json")

    @property
    def scale(self) -> int:
        """Side of a latent pixel in pixels."""
        return int(2 ** (len(self.block_out_channels) - 1))

    def decode_bytes(self, height: int, width: int, num_frames: int, tile: bool, dtype_bytes: int) -> int:
        """See `PackedModelInfo.decode_bytes`. Pictures have one frame.

        At the peak the first of the last blocks holds, for each pixel, its input, the normalized input and the SiLU of
        that; or the upsampling before it holds its input and the input of its block, of a quarter of the pixels, the
        upsampled values and their convolution.
        """
        before, earlier = self.block_out_channels[:2][-1], self.block_out_channels[:3][-1]
        of_pixel = dtype_bytes * max(3 * before, 2 * before + (before + earlier) // 4)
        return picture_bytes(height, width, of_pixel, self.sample_size if tile else None)

    def expected_weights(self) -> ExpectedWeights:
        """Weights whose shapes follow from these sizes, by their names in diffusers."""
        first, last = self.block_out_channels[0], self.block_out_channels[-1]
        return ExpectedWeights(
            {
                "decoder.conv_in.weight": (last, self.latent_channels, 3, 3),
                "decoder.conv_norm_out.weight": (first,),
                "encoder.conv_in.bias": (first,),
            }
        )


def inner_width(width: int) -> int:
    """Channels inside a feed-forward layer."""
    return int(width / 3 * 8)
