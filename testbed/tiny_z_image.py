"""Tiny random Z-Image models; see `tiny_models`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from testbed.tiny_models import randomize, tiny_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TURBO_SHIFT, BASE_SHIFT = 3.0, 6.0


def build_tiny_z_image(
    path: Path,
    *,
    heads: int = 3,
    text_dim: int = 32,
    text_heads: int = 2,
    text_kv_heads: int = 1,
    vae_sample_size: int = 96,
    shift: float = TURBO_SHIFT,
    seed: int = 0,
    time_scale: float = 1.0,
    default_sampling_params: dict[str, object] | None = None,
) -> Path:
    """Write a ZImagePipeline folder to `path` and return it.

    shift: of the schedule, in which Z-Image-Turbo and Z-Image differ; vae_sample_size: side of its tiles in pixels;
    time_scale: how much the timestep matters, a random model of 1 is another one at each step.
    """
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    vae = AutoencoderKL(
        latent_channels=16,
        block_out_channels=[8, 16, 16, 16],
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        sample_size=vae_sample_size,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    ZImagePipeline(
        tokenizer=tokenizer,
        text_encoder=randomize(_text_encoder(tokenizer, text_dim, text_heads, text_kv_heads)),
        transformer=tiny_z_image_transformer(heads=heads, text_dim=text_dim, t_scale=1000 * time_scale),
        vae=randomize(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift),
    ).save_pretrained(path)
    if default_sampling_params is not None:
        (path / "default_sampling_params.json").write_text(json.dumps(default_sampling_params))
    torch.set_rng_state(generator_state)
    return path


def tiny_z_image_transformer(
    *, heads: int, layers: int = 2, text_dim: int = 32, **config: Any
) -> ZImageTransformer2DModel:
    """A random diffusers transformer, its pad tokens included; heads of 16 channels."""
    transformer = ZImageTransformer2DModel(
        **{
            "in_channels": 16,
            "dim": heads * 16,
            "n_layers": layers,
            "n_refiner_layers": 2,
            "n_heads": heads,
            "n_kv_heads": heads,
            "cap_feat_dim": text_dim,
            "axes_dims": [4, 6, 6],
            "axes_lens": [1024, 64, 64],
            **config,
        }
    ).eval()
    randomize(transformer)
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    return transformer


def _text_encoder(tokenizer: Qwen2Tokenizer, width: int, heads: int, kv_heads: int) -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3Model(config).eval()
