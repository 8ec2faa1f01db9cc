"""Networks of the video model: Wan's classes in small, its scheduler, and a T5 tokenizer of the captions' words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders import autoencoder_kl_wan as vae_module
from torch import nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from ..demo_model.network import LATENT_CHANNELS, close_residual_branches, save_pipeline
from .motions import FRAMES, FRAMES_PER_SECOND, SIDE, words

TEXT_WIDTH = 128
CAPTION_TOKENS = 32  # max_sequence_length of the pipeline: captions are padded to it
LATENT_FRAMES = 1 + (FRAMES - 1) // 4
LATENT_SIDE = SIDE // 8
LATENT_SHAPE = (LATENT_CHANNELS, LATENT_FRAMES, LATENT_SIDE, LATENT_SIDE)
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"-()&"
GUIDANCE, STEPS = 3.0, 20
DEFAULTS = {
    "height": SIDE,
    "width": SIDE,
    "num_frames": FRAMES,
    "fps": FRAMES_PER_SECOND,
    "num_inference_steps": STEPS,
    "guidance_scale": GUIDANCE,
    "negative_prompt": "",
    "max_sequence_length": CAPTION_TOKENS,
}
"""Content of the model's default_sampling_params.json."""


def build_tokenizer() -> T5Tokenizer:
    """Tokenizer with one token for each word of the captions; other words are spelled in letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -12.0)]
    whole = [(f"▁{word}", -8.0) for word in dict.fromkeys(words())]
    return T5Tokenizer(
        vocab=[*special, *whole, *[(letter, -12.0) for letter in LETTERS]], extra_ids=0, model_max_length=512
    )


def build_text_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def build_transformer() -> WanTransformer3DModel:
    """Transformer whose output starts at zero."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=256,
        ffn_dim=768,
        num_layers=8,
        rope_max_seq_len=256,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


@torch.no_grad()
def build_autoencoder() -> AutoencoderKLWan:
    """Autoencoder whose decoder starts by showing each latent frame several times, nearly alike."""
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 3, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.normal_(0, module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                module.bias.zero_()
    for module in vae.modules():
        if isinstance(module, vae_module.WanResample) and module.mode == "upsample3d":
            weight = module.time_conv.weight  # [2 * channels, channels, 3, 1, 1]
            weight.mul_(0.3)
            weight[:, :, -1, 0, 0] += torch.eye(weight.shape[1]).repeat(2, 1)
    close_residual_branches(vae, vae_module.WanResidualBlock, vae_module.WanAttentionBlock)
    return vae


def build_scheduler() -> UniPCMultistepScheduler:
    """Scheduler with the published settings of Wan 2.1 for small videos."""
    return UniPCMultistepScheduler(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def compile_blocks(transformer: WanTransformer3DModel) -> None:
    """Compile the transformer's blocks; all have one shape, so the first one's code serves all."""
    for block in transformer.blocks:
        block.compile(dynamic=False)


def save_model(folder: Path, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any) -> None:
    """Save copies of the trained parts as a WanPipeline in bf16, with the model's default parameters."""
    plain = {
        "text_encoder": (build_text_encoder(tokenizer), text_encoder),
        "vae": (build_autoencoder(), vae),
        "transformer": (build_transformer(), transformer),
    }
    for copy, trained in plain.values():
        copy.load_state_dict(trained.state_dict())
    plain["vae"][0].register_to_config(latents_mean=vae.config.latents_mean, latents_std=vae.config.latents_std)
    parts = {name: copy for name, (copy, _) in plain.items()}
    save_pipeline(folder, WanPipeline, tokenizer=tokenizer, scheduler=build_scheduler(), **parts)
    (folder / "default_sampling_params.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
