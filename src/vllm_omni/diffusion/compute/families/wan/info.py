"""Facts of a Wan model, read from its configs (no torch at import)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.catalog.configs import check_config_values, read_config, read_own_schedule
from vllm_omni.diffusion.catalog.default_params import read_default_sampling_params
from vllm_omni.diffusion.catalog.expected_weights import ExpectedWeights
from vllm_omni.diffusion.catalog.folder_files import MODEL_INDEX
from vllm_omni.diffusion.catalog.model_info import Guidance
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo, Shares
from vllm_omni.diffusion.catalog.tea_cache_file import read_tea_cache_coefficients
from vllm_omni.diffusion.catalog.tokenizer_files import TokenizerNeeds
from vllm_omni.diffusion.compute.families.wan.config import (
    PATCH_SIZE,
    PROCESSOR_FILE,
    ClipVisionConfig,
    UMT5Config,
    WanConfig,
    WanPipelineConfig,
    WanVaeConfig,
    clip_side,
)
from vllm_omni.diffusion.compute.families.wan.image_input import WanImageInput
from vllm_omni.diffusion.compute.families.wan.prompts import WanTokenizer
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.images import InputImage

MAX_PROMPT_TOKENS = 512
"""Tokens of a prompt with its padding that the model was trained with: diffusers' default, here the limit too."""
FPS, FPS_5B = 16, 24
"""Frames a second of the videos that the models were trained on; no config says it."""
DEFAULTS = {
    "height": 480,
    "width": 832,
    "num_frames": 81,
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
    "max_sequence_length": MAX_PROMPT_TOKENS,
}
"""Defaults of diffusers' pipelines."""
DEFAULTS_5B = DEFAULTS | {"height": 704, "width": 1280, "num_frames": 121}
"""Defaults on the published card of the model of 5B parameters."""
AVAILABLE = {
    "patch_size": [1, PATCH_SIZE, PATCH_SIZE],
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
"""Keys of transformer/config.json and the only value of each that this package computes."""
END_TOKEN = "</s>"


@dataclass(frozen=True, kw_only=True)
class WanModelInfo(PackedModelInfo):
    """Facts of a Wan model. Its input pictures become channels of the video's tokens, and no tokens of their own."""

    encodes_whole_video: bool
    """Whether the VAE encodes the input picture with empty frames up to the length of the video."""

    def fit_image(self, image: InputImage, height: int, width: int) -> InputImage:
        assert isinstance(self.image_input, WanImageInput), "a model that takes no input pictures was sent some"
        return self.image_input.fit(image, height, width)

    def num_reference_tokens(self, image: InputImage) -> int:
        return 0

    def num_encoded_image_tokens(
        self, images: Sequence[InputImage], height: int, width: int, num_frames: int = 1
    ) -> int:
        if self.encodes_whole_video:  # one encode, with all pictures in their places
            return self.num_decoded_tokens(height, width, num_frames) if images else 0
        return len(images) * self.num_decoded_tokens(height, width)

    def num_encoded_frames(self, images: Sequence[InputImage], num_frames: int) -> int:
        return self.latent_frames(num_frames) if images and self.encodes_whole_video else 1


def describe(path: Path) -> PackedModelInfo:
    """Facts of the model in `path`.

    Raises ConfigError for a component whose config cannot be read and for a variant that the family does not compute.
    """
    pipeline = WanPipelineConfig.from_dict(read_config(path, "", MODEL_INDEX))
    transformer = _read_transformer(path, pipeline)
    vae = WanVaeConfig.from_dict(read_config(path, "vae"))
    text_encoder = UMT5Config.from_dict(read_config(path, "text_encoder"))
    read_own_schedule(path)
    _check_sizes(pipeline, transformer, vae, text_encoder)
    expected_weights: dict[str, list[ExpectedWeights]] = {
        name: [transformer.expected_weights()] for name in pipeline.transformers
    }
    expected_weights |= {"vae": [vae.expected_weights()], "text_encoder": [text_encoder.expected_weights()]}
    if transformer.sees_image:
        clip = ClipVisionConfig.from_dict(read_config(path, "image_encoder"), transformer)
        expected_weights["image_encoder"] = [clip.expected_weights()]
    family_defaults: dict[str, Any] = DEFAULTS_5B if pipeline.expand_timesteps else DEFAULTS
    defaults = family_defaults | read_default_sampling_params(path)
    side = PATCH_SIZE * vae.scale_factor_spatial
    return WanModelInfo(
        path=path,
        family="wan",
        size_multiple=side,
        pixels_per_token=side,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        count_prompt_tokens=WanTokenizer(path / "tokenizer"),
        # A token costs 12 width² + 4 width ffn_dim in a block's linear layers, and 4 width n in attention over n.
        attention_tokens=3.0 * transformer.dim + transformer.ffn_dim,
        cross_attention_tokens=MAX_PROMPT_TOKENS,
        num_heads=transformer.num_attention_heads,
        head_dim=transformer.attention_head_dim,
        num_blocks=transformer.num_layers,
        tea_cache_coefficients=read_tea_cache_coefficients(path),
        tensor_shares=Shares({"attention heads": transformer.num_attention_heads, "MLP channels": transformer.ffn_dim}),
        text_encoder_shares=text_encoder.shares,
        tokenizer_needs=TokenizerNeeds((END_TOKEN,), text_encoder.vocab_size),
        vae=vae,
        expected_weights=expected_weights,
        guidance=Guidance("guidance_scale", 0.0, "", () if pipeline.boundary_ratio is None else ("guidance_scale_2",)),
        image_input=_image_input(path, pipeline, transformer, defaults, side),
        encodes_whole_video=pipeline.from_image and not pipeline.expand_timesteps,
        frame_multiple=vae.scale_factor_temporal,
        default_fps=FPS_5B if pipeline.expand_timesteps else FPS,
        default_sampling_params=defaults,
    )


def _read_transformer(path: Path, pipeline: WanPipelineConfig) -> WanConfig:
    """Config that all transformers of the model share."""
    configs = []
    for component in pipeline.transformers:
        values = read_config(path, component)
        check_config_values(values, AVAILABLE)
        configs.append(WanConfig.from_dict(values, component))
    if configs[-1] != configs[0]:
        raise ConfigError(
            "transformer/config.json and transformer_2/config.json take the same sizes, got different ones"
        )
    return configs[0]


def _check_sizes(
    pipeline: WanPipelineConfig, transformer: WanConfig, vae: WanVaeConfig, text_encoder: UMT5Config
) -> None:
    """Raise ConfigError for a transformer that does not fit the pipeline and the other components."""
    # The picture to animate is further channels: its latents, and which of the frames of each latent frame are given.
    num_given = vae.z_dim + vae.scale_factor_temporal if pipeline.from_image and not pipeline.expand_timesteps else 0
    for key, got, expected, reason in (
        (
            "in_channels",
            transformer.in_channels,
            vae.z_dim + num_given,
            "which the pipeline makes of the VAE's latents",
        ),
        ("out_channels", transformer.num_output_channels, vae.z_dim, "the z_dim of vae/config.json"),
        ("text_dim", transformer.text_dim, text_encoder.d_model, "the d_model of text_encoder/config.json"),
    ):
        if got != expected:
            raise ConfigError(f"transformer/config.json: {key} takes {expected}, {reason}, got {got}")
    if transformer.sees_image and not pipeline.from_image:
        raise ConfigError(
            f"transformer/config.json: image_dim takes null with a WanPipeline, which is given no picture, "
            f"got {transformer.image_dim}"
        )


def _image_input(
    path: Path, pipeline: WanPipelineConfig, transformer: WanConfig, defaults: dict[str, Any], side: int
) -> WanImageInput | None:
    area = defaults["height"] * defaults["width"]
    if pipeline.expand_timesteps:  # one model for text and for a first frame, whose timestep marks it as given
        return WanImageInput(int(pipeline.from_image), 1, area, side)
    if not pipeline.from_image:
        return None
    if transformer.sees_image:
        clip = clip_side(read_config(path, "image_processor", PROCESSOR_FILE))
        return WanImageInput(transformer.num_seen_images, transformer.num_seen_images, area, side, clip)
    return WanImageInput(1, 2, area, side)
