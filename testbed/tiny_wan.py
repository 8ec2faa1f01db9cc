"""Tiny random Wan models of every kind, as diffusers saves them; see `tiny_models`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from testbed.tiny_models import randomize
from testbed.tiny_text_encoders import t5_fields, t5_tokenizer

HEAD_DIM = 16
"""Rotated by 8 channels for the frame, 4 for the row and 4 for the column."""
TEXT_DIM = 32
IMAGE_DIM = 32
IMAGE_SIDE = 28
"""Pixels of a side of CLIP's input: 2x2 patches."""
IMAGE_TOKENS = 5
"""CLIP's tokens of a picture: its class token and the patches."""
LATENTS, CONDITION_LATENTS = 16, 20
"""Channels of the latents, and of the picture to animate: its latents and four channels that say which are given."""
LATENTS_5B = 12


@dataclass(frozen=True)
class TinyWan:
    """Parts in which the published Wan models differ."""

    from_image: bool = False
    sees_image: int = 0
    """Pictures that the transformer sees by CLIP (Wan 2.1); 0: it has no attention to them."""
    has_two_experts: bool = False
    is_5b: bool = False
    """Timesteps per token, and a VAE with patches and residual blocks."""

    @property
    def in_channels(self) -> int:
        if self.is_5b:
            return LATENTS_5B
        return LATENTS + CONDITION_LATENTS if self.from_image else LATENTS


KINDS = {
    "t2v-2.1": TinyWan(),
    "t2v-a14b": TinyWan(has_two_experts=True),
    "ti2v-5b": TinyWan(is_5b=True),
    "i2v-2.1": TinyWan(from_image=True, sees_image=1),
    "flf2v-2.1": TinyWan(from_image=True, sees_image=2),
    "i2v-a14b": TinyWan(from_image=True, has_two_experts=True),
    "i2v-5b": TinyWan(from_image=True, is_5b=True),
}
"""`ti2v-5b` and `i2v-5b` have the same weights: the first is a WanPipeline, the second a WanImageToVideoPipeline."""
BOUNDARY = 0.875
"""Share of the training timesteps at which `transformer_2` takes over."""


def build_tiny_wan(
    path: Path,
    kind: str = "t2v-2.1",
    *,
    heads: int = 3,
    layers: int = 2,
    text_heads: int = 2,
    seed: int = 0,
    time_scale: float = 1.0,
    flow_shift: float = 3.0,
    is_euler: bool = False,
    default_sampling_params: dict[str, object] | None = None,
) -> Path:
    """Write a model folder of the given kind (see `KINDS`) to `path` and return it.

    time_scale: how much the timestep matters, a random model of 1 is another one at each step; flow_shift: of the
    schedule; is_euler: FlowMatchEulerDiscreteScheduler instead of UniPC.
    """
    parts = KINDS[kind]
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(**(t5_fields(tokenizer, TEXT_DIM) | {"num_heads": text_heads, "relative_attention_num_buckets": 8}))
    )
    components: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": _randomized_text_encoder(text_encoder),
        "vae": randomize(tiny_wan_vae(parts.is_5b)),
        "scheduler": _scheduler(flow_shift, is_euler),
    }
    for name in ("transformer", "transformer_2")[: 1 + parts.has_two_experts]:
        components[name] = tiny_wan_transformer(
            heads=heads, layers=layers, in_channels=parts.in_channels, num_images=parts.sees_image,
            out_channels=LATENTS_5B if parts.is_5b else LATENTS, time_scale=time_scale,
        )  # fmt: skip
    if parts.sees_image:
        components["image_encoder"] = randomize(_image_encoder())
        components["image_processor"] = CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
        )
    pipeline = WanImageToVideoPipeline if parts.from_image else WanPipeline
    boundary = BOUNDARY if parts.has_two_experts else None
    pipeline(**components, boundary_ratio=boundary, expand_timesteps=parts.is_5b).save_pretrained(path)
    if parts.sees_image:
        _add_unread_norms(path / "transformer" / "diffusion_pytorch_model.safetensors", layers, heads * HEAD_DIM)
    if default_sampling_params is not None:
        (path / "default_sampling_params.json").write_text(json.dumps(default_sampling_params))
    torch.set_rng_state(generator_state)
    return path


def tiny_wan_transformer(
    *,
    heads: int,
    layers: int = 2,
    in_channels: int = LATENTS,
    out_channels: int = LATENTS,
    num_images: int = 0,
    time_scale: float = 1.0,
    **config: Any,
) -> WanTransformer3DModel:
    """A random diffusers transformer; heads of 16 channels. num_images: pictures that it sees by CLIP."""
    seen = {"image_dim": IMAGE_DIM, "added_kv_proj_dim": heads * HEAD_DIM} if num_images else {}
    if num_images > 1:
        seen["pos_embed_seq_len"] = num_images * IMAGE_TOKENS
    transformer = WanTransformer3DModel(
        **{
            "patch_size": (1, 2, 2),
            "num_attention_heads": heads,
            "attention_head_dim": HEAD_DIM,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "text_dim": TEXT_DIM,
            "freq_dim": 64,
            "ffn_dim": 6 * HEAD_DIM,
            "num_layers": layers,
            "rope_max_seq_len": 64,
            **seen,
            **config,
        }
    ).eval()
    randomize(transformer)
    with torch.no_grad():
        transformer.condition_embedder.time_embedder.linear_1.weight.mul_(time_scale)
    return transformer


def tiny_wan_vae(is_5b: bool = False) -> AutoencoderKLWan:
    """A VAE of Wan 2.1, or with patches and residual blocks as in the 5B model; its parameters are diffusers' own."""
    if not is_5b:
        return AutoencoderKLWan(
            base_dim=8, z_dim=LATENTS, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
    return AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=12,
        z_dim=LATENTS_5B,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=torch.randn(LATENTS_5B).mul(0.2).tolist(),
        latents_std=torch.rand(LATENTS_5B).add(0.5).tolist(),
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )


def _add_unread_norms(file: Path, layers: int, width: int) -> None:
    """Add the weights that published checkpoints have and nothing reads."""
    norms = {f"blocks.{i}.attn2.norm_added_q.weight": torch.randn(width) for i in range(layers)}
    save_file(load_file(file) | norms, file, {"format": "pt"})


def _scheduler(flow_shift: float, is_euler: bool) -> Any:
    if is_euler:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=flow_shift)
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=flow_shift
    )


def _randomized_text_encoder(encoder: UMT5EncoderModel) -> Any:
    """Random weights; T5 does not scale its scores, so the queries are small."""
    randomize(encoder)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("SelfAttention.q.weight"):
                parameter.mul_(0.25)
    return encoder.eval()


def _image_encoder() -> CLIPVisionModel:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=IMAGE_DIM,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=IMAGE_SIDE,
            patch_size=14,
        )
    ).eval()
