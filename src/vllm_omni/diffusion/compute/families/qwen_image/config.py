"""Sizes of Qwen-Image's parts, and the weights that follow from them (no torch here)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.diffusion.catalog.configs import TIMESTEP_CHANNELS, from_values
from vllm_omni.diffusion.catalog.decode_memory import FLOAT32_BYTES, picture_bytes
from vllm_omni.diffusion.catalog.expected_weights import ExpectedWeights, LayerList, linear_shapes
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.field_values import shown

TILE_SIDE = 256
"""Side of a tile of the VAE in pixels, when its tiling is on: diffusers' constant."""
DIVISOR_BYTES = 8
"""Bytes of each pixel's divisor in a norm of the VAE, twice in float32."""
PATCHES = "patch_embed.proj.weight"
"""Name of the weight of the vision tower's first layer."""


@dataclass(frozen=True)
class QwenImageConfig:
    """Keys of transformer/config.json that the architecture depends on."""

    in_channels: int = 64
    out_channels: int = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    patch_size: int = 2
    zero_cond_t: bool = False
    """Whether tokens of reference pictures, which carry no noise, are modulated as at timestep 0."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QwenImageConfig:
        """Read a parsed config.json. Raises ConfigError for values of wrong types or that contradict each other."""
        config = from_values(cls, values, "transformer/config.json")
        if sum(config.axes_dims_rope) != config.attention_head_dim:
            raise ConfigError(
                f"transformer/config.json: axes_dims_rope {config.axes_dims_rope} must add up to "
                f"attention_head_dim, {config.attention_head_dim}"
            )
        return config

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def expected_weights(self) -> ExpectedWeights:
        """All weights, by their names in diffusers."""
        dim, head = self.dim, self.attention_head_dim
        latent = self.patch_size**2 * self.out_channels
        block: dict[str, tuple[int, ...]] = {
            f"attn.norm_{name}.weight": (head,) for name in ("q", "k", "added_q", "added_k")
        }
        for stream, projections in (
            ("img", ("to_q", "to_k", "to_v", "to_out.0")),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        ):
            for name in projections:
                block |= linear_shapes(f"attn.{name}", dim, dim)
            block |= linear_shapes(f"{stream}_mod.1", 6 * dim, dim)
            block |= linear_shapes(f"{stream}_mlp.net.0.proj", 4 * dim, dim)
            block |= linear_shapes(f"{stream}_mlp.net.2", dim, 4 * dim)
        shapes = (
            linear_shapes("time_text_embed.timestep_embedder.linear_1", dim, TIMESTEP_CHANNELS)
            | linear_shapes("time_text_embed.timestep_embedder.linear_2", dim, dim)
            | linear_shapes("img_in", dim, self.in_channels)
            | linear_shapes("txt_in", dim, self.joint_attention_dim)
            | linear_shapes("norm_out.linear", 2 * dim, dim)
            | linear_shapes("proj_out", latent, dim)
            | {"txt_norm.weight": (self.joint_attention_dim,)}
        )
        layers = {"transformer_blocks": LayerList("num_layers", self.num_layers, block)}
        return ExpectedWeights(shapes, layers, is_complete=True)


@dataclass(frozen=True)
class QwenImageVaeConfig:
    """Keys of vae/config.json that pictures and latents depend on."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QwenImageVaeConfig:
        """Read a parsed config.json. Raises ConfigError for values of wrong types or that contradict each other."""
        config = from_values(cls, values, "vae/config.json")
        for key, numbers in (("latents_mean", config.latents_mean), ("latents_std", config.latents_std)):
            if key in values and len(numbers) != config.z_dim:
                raise ConfigError(
                    f"vae/config.json: {key} takes a number for each of the {config.z_dim} channels of z_dim, "
                    f"got {len(numbers)}"
                )
        if len(config.temperal_downsample) != len(config.dim_mult) - 1:
            raise ConfigError(
                f"vae/config.json: temperal_downsample takes one value less than dim_mult, got "
                f"{len(config.temperal_downsample)} and {len(config.dim_mult)}"
            )
        return config

    @property
    def scale(self) -> int:
        """Side of a latent pixel in pixels."""
        return int(2 ** len(self.temperal_downsample))

    def decode_bytes(self, height: int, width: int, num_frames: int, tile: bool, dtype_bytes: int) -> int:
        """See `PackedModelInfo.decode_bytes`. Pictures have one frame.

        At the peak the last blocks hold, for each pixel, the block's input, the residual and the layer's input, beside
        two or three results of the norm, which computes in float32; or the upsampling before them has made float32
        values of twice the channels, and those in the VAE's dtype.
        """
        last, before = self.base_dim * self.dim_mult[0], self.base_dim * self.dim_mult[:2][-1]
        norm = 3 * dtype_bytes if dtype_bytes == FLOAT32_BYTES else 2 * FLOAT32_BYTES
        converted = 0 if dtype_bytes == FLOAT32_BYTES else dtype_bytes
        of_pixel = max(
            last * (3 * dtype_bytes + norm), before * (FLOAT32_BYTES + converted) + before * dtype_bytes // 2
        )
        return picture_bytes(height, width, of_pixel + DIVISOR_BYTES, TILE_SIDE if tile else None)

    def expected_weights(self) -> ExpectedWeights:
        """Weights whose shapes follow from these sizes, by their names in diffusers."""
        last = self.base_dim * self.dim_mult[-1]
        return ExpectedWeights(
            {
                "decoder.conv_in.weight": (last, self.z_dim, 3, 3, 3),
                "decoder.norm_out.gamma": (self.base_dim * self.dim_mult[0], 1, 1, 1),
                "post_quant_conv.weight": (self.z_dim, self.z_dim, 1, 1, 1),
                "encoder.conv_in.bias": (self.base_dim * self.dim_mult[0],),
            }
        )


@dataclass(frozen=True)
class QwenImageVisionConfig:
    """Keys of the section vision_config of text_encoder/config.json that the vision tower depends on."""

    depth: int = 32
    hidden_size: int = 3584
    intermediate_size: int = 3420
    out_hidden_size: int = 3584
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QwenImageVisionConfig:
        """Read `values`, all of text_encoder/config.json. Raises ConfigError for values of wrong types."""
        section = values.get("vision_config")
        if not isinstance(section, dict):
            raise ConfigError(f"text_encoder/config.json: vision_config takes a JSON object, got {shown(section)}")
        return from_values(cls, section, "text_encoder/config.json: vision_config")

    def expected_weights(self) -> ExpectedWeights:
        """All weights of the tower, by their names in transformers after `visual.`."""
        width, inner, patch = self.hidden_size, self.intermediate_size, self.patch_size
        merged = width * self.spatial_merge_size**2
        block = (
            {"norm1.weight": (width,), "norm2.weight": (width,)}
            | linear_shapes("attn.qkv", 3 * width, width)
            | linear_shapes("attn.proj", width, width)
            | linear_shapes("mlp.gate_proj", inner, width)
            | linear_shapes("mlp.up_proj", inner, width)
            | linear_shapes("mlp.down_proj", width, inner)
        )
        shapes = (
            {PATCHES: (width, self.in_channels, self.temporal_patch_size, patch, patch), "merger.ln_q.weight": (width,)}
            | linear_shapes("merger.mlp.0", merged, merged)
            | linear_shapes("merger.mlp.2", self.out_hidden_size, merged)
        )
        return ExpectedWeights(shapes, {"blocks": LayerList("depth", self.depth, block)}, anchor=PATCHES)
