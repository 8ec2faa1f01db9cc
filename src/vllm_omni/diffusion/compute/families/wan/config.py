"""Sizes of Wan's parts, and the weights that follow from them (no torch here)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vllm_omni.diffusion.catalog.configs import from_values
from vllm_omni.diffusion.catalog.decode_memory import FLOAT32_BYTES
from vllm_omni.diffusion.catalog.expected_weights import ExpectedWeights, LayerList, Shapes, linear_shapes
from vllm_omni.diffusion.catalog.folder_files import MODEL_INDEX
from vllm_omni.diffusion.catalog.model_index import read_components
from vllm_omni.diffusion.catalog.packed_info import Shares
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.field_values import shown

IMAGE_TO_VIDEO = "WanImageToVideoPipeline"
PATCH_SIZE = 2
"""Rows and columns of latent pixels in a token; a token has one latent frame."""
PATCH_PIXELS = PATCH_SIZE**2
ROPE_THETA = 10000.0
TILE_SIDE = 256
"""Side of a tile of the VAE in pixels, when its tiling is on: diffusers' constant."""
KEPT_FRAMES = 2
"""Frames of its input that a causal convolution of the VAE keeps for the next latent frame."""
PIECE_PIXEL_BYTES = 300
"""Bytes of each pixel's colours in the frames of one latent frame: of tiles, of the blended frames, and rounded."""
UNREAD_ENDS = (".norm_added_q.weight",)
"""Ends of the names of weights that published checkpoints have and neither diffusers nor we read."""
PROCESSOR_FILE = "preprocessor_config.json"
BICUBIC = 3
"""Pillow's number of the method by which CLIP's processor resizes."""
MAX_CLIP_SIDE = 1024
CLIP_ANCHOR = "embeddings.class_embedding"
"""A weight of CLIP's vision tower; the part of its name before this is a prefix of all names."""


@dataclass(frozen=True)
class WanPipelineConfig:
    """Keys of model_index.json in which Wan's models differ."""

    boundary_ratio: float | None = None
    """Share of the training timesteps below which `transformer_2` computes the steps; None: it has none."""
    expand_timesteps: bool = False
    """Whether each token has a timestep of its own, so that a given first frame is at 0 (Wan 2.2 5B)."""
    from_image: bool = False
    """Whether a video begins with a given picture. Follows from the pipeline's class."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WanPipelineConfig:
        """Raises ConfigError for values of wrong types, and for a `boundary_ratio` that does not fit the components."""
        read = {key: values[key] for key in ("boundary_ratio", "expand_timesteps") if key in values}
        read["from_image"] = values.get("_class_name") == IMAGE_TO_VIDEO
        config = from_values(cls, read, MODEL_INDEX)
        components = read_components(values)
        if "transformer" not in components:
            raise ConfigError(f"{MODEL_INDEX} has no transformer")
        has_boundary, has_second = config.boundary_ratio is not None, "transformer_2" in components
        if has_boundary != has_second or not 0 < (config.boundary_ratio or 0.5) < 1:
            raise ConfigError(
                f"{MODEL_INDEX}: boundary_ratio takes a number between 0 and 1 with a transformer_2, and null without, "
                f"got {shown(config.boundary_ratio)} {'with' if has_second else 'without'} a transformer_2"
            )
        return config

    @property
    def transformers(self) -> tuple[str, ...]:
        """Components that are transformers, in the order of the steps that they compute."""
        return ("transformer",) if self.boundary_ratio is None else ("transformer", "transformer_2")


@dataclass(frozen=True)
class WanConfig:
    """Keys of transformer/config.json that the architecture depends on."""

    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int | None = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    pos_embed_seq_len: int | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], component: str = "transformer") -> WanConfig:
        """Raises ConfigError for values of wrong types, and for values that contradict each other."""
        place = f"{component}/config.json"
        config = from_values(cls, values, place)
        if config.attention_head_dim % 2:
            raise ConfigError(f"{place}: attention_head_dim takes an even number, got {config.attention_head_dim}")
        if config.freq_dim % 2:
            raise ConfigError(f"{place}: freq_dim takes an even number, got {config.freq_dim}")
        seen = config.dim if config.sees_image else None
        if config.added_kv_proj_dim != seen:
            raise ConfigError(
                f"{place}: added_kv_proj_dim takes {shown(seen)} with image_dim {shown(config.image_dim)}, "
                f"got {shown(config.added_kv_proj_dim)}"
            )
        if config.pos_embed_seq_len and (not config.sees_image or config.pos_embed_seq_len % 2):
            raise ConfigError(
                f"{place}: pos_embed_seq_len takes an even number with an image_dim, and null without, "
                f"got {config.pos_embed_seq_len}"
            )
        return config

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def axes_dims(self) -> tuple[int, int, int]:
        """Channels of a head that the frame, the row and the column rotate."""
        side = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * side, side, side

    @property
    def num_output_channels(self) -> int:
        """Channels of a velocity."""
        return self.out_channels or self.in_channels

    @property
    def sees_image(self) -> bool:
        """Whether blocks attend to CLIP's embeddings of the input pictures (Wan 2.1)."""
        return self.image_dim is not None

    @property
    def num_seen_images(self) -> int:
        """Pictures that the blocks attend to: two for the models that are given the first and the last frame."""
        return 0 if not self.sees_image else 2 if self.pos_embed_seq_len else 1

    def expected_weights(self) -> ExpectedWeights:
        """All weights, by their names in diffusers."""
        dim, embedder = self.dim, "condition_embedder"
        shapes = (
            linear_shapes(f"{embedder}.time_embedder.linear_1", dim, self.freq_dim)
            | linear_shapes(f"{embedder}.time_embedder.linear_2", dim, dim)
            | linear_shapes(f"{embedder}.time_proj", 6 * dim, dim)
            | linear_shapes(f"{embedder}.text_embedder.linear_1", dim, self.text_dim)
            | linear_shapes(f"{embedder}.text_embedder.linear_2", dim, dim)
            | linear_shapes("proj_out", PATCH_PIXELS * self.num_output_channels, dim)
            | {
                "patch_embedding.weight": (dim, self.in_channels, 1, PATCH_SIZE, PATCH_SIZE),
                "patch_embedding.bias": (dim,),
                "scale_shift_table": (1, 2, dim),
            }
        )
        if self.image_dim is not None:
            shapes |= _image_embedder_shapes(f"{embedder}.image_embedder", self.image_dim, dim, self.pos_embed_seq_len)
        layers = {"blocks": LayerList("num_layers", self.num_layers, self._block_shapes())}
        return ExpectedWeights(shapes, layers, is_complete=True, unread=UNREAD_ENDS)

    def _block_shapes(self) -> Shapes:
        dim = self.dim
        block: dict[str, tuple[int, ...]] = {
            "scale_shift_table": (1, 6, dim),
            "norm2.weight": (dim,),
            "norm2.bias": (dim,),
        }
        for attention in ("attn1", "attn2"):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                block |= linear_shapes(f"{attention}.{name}", dim, dim)
            block |= {f"{attention}.norm_{name}.weight": (dim,) for name in "qk"}
        if self.sees_image:
            block |= {"attn2.norm_added_k.weight": (dim,)}
            for name in ("add_k_proj", "add_v_proj"):
                block |= linear_shapes(f"attn2.{name}", dim, dim)
        return (
            block | linear_shapes("ffn.net.0.proj", self.ffn_dim, dim) | linear_shapes("ffn.net.2", dim, self.ffn_dim)
        )


def _image_embedder_shapes(name: str, image_dim: int, dim: int, num_positions: int | None) -> Shapes:
    shapes = linear_shapes(f"{name}.ff.net.0.proj", image_dim, image_dim) | linear_shapes(
        f"{name}.ff.net.2", dim, image_dim
    )
    for norm, width in (("norm1", image_dim), ("norm2", dim)):
        shapes |= {f"{name}.{norm}.weight": (width,), f"{name}.{norm}.bias": (width,)}
    return shapes | ({f"{name}.pos_embed": (1, num_positions, image_dim)} if num_positions else {})


@dataclass(frozen=True)
class WanVaeConfig:
    """Keys of vae/config.json that videos and latents depend on."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    is_residual: bool = False
    """Whether blocks have shortcuts of their own, as in the VAE of the model of 5B parameters."""
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WanVaeConfig:
        """Raises ConfigError for values of wrong types, and for values that contradict each other."""
        place = "vae/config.json"
        config = from_values(cls, values, place)
        if len(config.temperal_downsample) != len(config.dim_mult) - 1:
            raise ConfigError(
                f"{place}: temperal_downsample takes {len(config.dim_mult) - 1} values, one less than dim_mult, "
                f"got {len(config.temperal_downsample)}"
            )
        scale = 2 ** len(config.temperal_downsample) * (config.patch_size or 1)
        for key, expected in (
            ("scale_factor_spatial", scale),
            ("scale_factor_temporal", 2 ** sum(config.temperal_downsample)),
        ):
            if (value := getattr(config, key)) != expected:
                raise ConfigError(f"{place}: {key} takes {expected}, which its other sizes make, got {value}")
        if config.in_channels != config.out_channels or config.out_channels != 3 * (config.patch_size or 1) ** 2:
            raise ConfigError(
                f"{place}: in_channels and out_channels take {3 * (config.patch_size or 1) ** 2} with patch_size "
                f"{shown(config.patch_size)}, got {config.in_channels} and {config.out_channels}"
            )
        return config

    def decode_bytes(self, height: int, width: int, num_frames: int, tile: bool, dtype_bytes: int) -> int:
        """See `PackedModelInfo.decode_bytes`. The VAE computes in float32, one latent frame after the other.

        Of tiles, one lies on the device with its features; those of the others wait in host memory.
        """
        side = max(height, width)
        if tile and side > TILE_SIDE:
            tile_pixels, shown_pixels = min(height, TILE_SIDE) * min(width, TILE_SIDE), height * width
        else:
            tile_pixels = shown_pixels = height * width
        is_video = num_frames > 1
        of_pixel = self._feature_values(is_video) + self._passing_values(is_video)
        frames = self.scale_factor_temporal if is_video else 1
        colours = shown_pixels * PIECE_PIXEL_BYTES * frames // self.scale_factor_temporal
        return int(FLOAT32_BYTES * tile_pixels * of_pixel) + colours

    def _decoder_dims(self) -> list[tuple[int, int]]:
        """Channels of the input and the output of each block of the decoder, the last one at the full resolution."""
        dim = self.decoder_base_dim or self.base_dim
        dims = [dim * multiple for multiple in (self.dim_mult[-1], *reversed(self.dim_mult))]
        # Without shortcuts of its own, a block's upsampling halves the channels.
        return [(d if self.is_residual or not i else d // 2, out) for i, (d, out) in enumerate(pairwise(dims))]

    def _feature_values(self, is_video: bool) -> float:
        """Numbers that the decoder keeps for the next latent frame, for each pixel of a frame."""
        dims = self._decoder_dims()
        area = 4.0 ** (len(dims) - 1) * (self.patch_size or 1) ** 2
        # The first convolution and those of two blocks in the middle, at the resolution of the latents.
        values = (self.z_dim + 4 * dims[0][0]) / area
        in_time = [*reversed(self.temperal_downsample), False]
        for (width, out), upsamples_time in zip(dims, in_time):
            values += (width + out * (2 * self.num_res_blocks + 1 + (upsamples_time and is_video))) / area
            last, area = out / area, area / 4
        return (values + last) * (KEPT_FRAMES if is_video else 1)

    def _passing_values(self, is_video: bool) -> float:
        """Numbers that exist beside the features at the peak, for each pixel of a frame.

        A convolution of the last block has its input alone, behind the kept frames, and padded, beside the new frames
        to keep and the inputs of the layers around it.
        """
        width, out = self._decoder_dims()[-1]
        frames = self.scale_factor_temporal if is_video else 1
        new = min(frames, KEPT_FRAMES)
        # A picture has no kept frames; zeros take their place.
        around = 2 * (frames + KEPT_FRAMES) if is_video else frames + KEPT_FRAMES
        inputs = width * frames * (2 if self.is_residual else 1)
        first = inputs + (out * frames if width != out else 0) + width * (frames + new + around)
        later = inputs + out * (2 * frames + new + around)
        return max(first, later) / (self.patch_size or 1) ** 2

    def expected_weights(self) -> ExpectedWeights:
        """Weights whose shapes follow from these sizes, by their names in diffusers."""
        decoder_dim = self.decoder_base_dim or self.base_dim
        return ExpectedWeights(
            {
                "decoder.conv_in.weight": (decoder_dim * self.dim_mult[-1], self.z_dim, 3, 3, 3),
                "decoder.conv_out.bias": (self.out_channels,),
                "encoder.conv_in.weight": (self.base_dim * self.dim_mult[0], self.in_channels, 3, 3, 3),
                "post_quant_conv.weight": (self.z_dim, self.z_dim, 1, 1, 1),
            }
        )


@dataclass(frozen=True)
class UMT5Config:
    """Keys of text_encoder/config.json that decide the shapes of the weights."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UMT5Config:
        """Raises ConfigError for values of wrong types, and for another kind of feed-forward layer."""
        if (kind := values.get("feed_forward_proj", "gated-gelu")) != "gated-gelu":
            raise ConfigError(
                f"text_encoder/config.json has feed_forward_proj={shown(kind)}: not available yet, only 'gated-gelu' is"
            )
        return from_values(cls, values, "text_encoder/config.json")

    @property
    def shares(self) -> Shares:
        """Numbers that the number of ranks must divide."""
        return Shares({"attention heads": self.num_heads, "MLP channels": self.d_ff, "channels": self.d_model})

    def expected_weights(self) -> ExpectedWeights:
        """Weights of all layers, by their names in transformers."""
        inner, width = self.num_heads * self.d_kv, self.d_model
        attention, mlp = "layer.0.SelfAttention", "layer.1.DenseReluDense"
        layer: dict[str, tuple[int, ...]] = {f"{attention}.{name}.weight": (inner, width) for name in "qkv"}
        layer |= {
            f"{attention}.o.weight": (width, inner),
            f"{attention}.relative_attention_bias.weight": (self.relative_attention_num_buckets, self.num_heads),
            f"{mlp}.wi_0.weight": (self.d_ff, width),
            f"{mlp}.wi_1.weight": (self.d_ff, width),
            f"{mlp}.wo.weight": (width, self.d_ff),
            "layer.0.layer_norm.weight": (width,),
            "layer.1.layer_norm.weight": (width,),
        }
        return ExpectedWeights(
            {"encoder.final_layer_norm.weight": (width,)},
            {"encoder.block": LayerList("num_layers", self.num_layers, layer)},
        )


@dataclass(frozen=True)
class ClipVisionConfig:
    """Keys of image_encoder/config.json that decide the shapes of the weights."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    image_size: int
    patch_size: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], transformer: WanConfig) -> ClipVisionConfig:
        """Raises ConfigError for values of wrong types, and for sizes that `transformer` does not take."""
        place = "image_encoder/config.json"
        config = from_values(cls, values, place)
        if config.hidden_size != transformer.image_dim:
            raise ConfigError(
                f"{place}: hidden_size takes {transformer.image_dim}, the image_dim of transformer/config.json, "
                f"got {config.hidden_size}"
            )
        if (seen := transformer.pos_embed_seq_len) not in (None, transformer.num_seen_images * config.num_tokens):
            raise ConfigError(
                f"transformer/config.json: pos_embed_seq_len takes {transformer.num_seen_images * config.num_tokens}, "
                f"the tokens of two pictures in image_encoder/, got {seen}"
            )
        return config

    @property
    def num_tokens(self) -> int:
        """Tokens of a picture: its patches, and one for all of it."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def expected_weights(self) -> ExpectedWeights:
        """Weights of the embedding and of all layers, by their names in transformers."""
        width, inner = self.hidden_size, self.intermediate_size
        layer: dict[str, tuple[int, ...]] = {}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer |= linear_shapes(f"self_attn.{name}", width, width)
        layer |= linear_shapes("mlp.fc1", inner, width) | linear_shapes("mlp.fc2", width, inner)
        for name in ("layer_norm1", "layer_norm2"):
            layer |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
        return ExpectedWeights(
            {
                CLIP_ANCHOR: (width,),
                "embeddings.patch_embedding.weight": (width, 3, self.patch_size, self.patch_size),
                "embeddings.position_embedding.weight": (self.num_tokens, width),
            },
            {"encoder.layers": LayerList("num_hidden_layers", self.num_hidden_layers, layer)},
            anchor=CLIP_ANCHOR,
        )


def clip_side(values: Mapping[str, Any]) -> int:
    """Pixels of the shorter side to which CLIP's processor resizes a picture, from its config.

    Raises ConfigError for another way to resize.
    """
    place = f"image_processor/{PROCESSOR_FILE}"
    for key, available in (("do_resize", True), ("resample", BICUBIC)):
        if (value := values.get(key, available)) != available:
            raise ConfigError(f"{place} has {key}={shown(value)}: not available yet, only {available} is")
    size = values.get("size", {"shortest_edge": 224})
    side = size.get("shortest_edge") if isinstance(size, Mapping) and len(size) == 1 else size
    if type(side) is not int or not 1 <= side <= MAX_CLIP_SIDE:
        raise ConfigError(
            f'{place}: size takes {{"shortest_edge": pixels}} of 1 to {MAX_CLIP_SIDE} pixels, got {shown(size)}'
        )
    return side
