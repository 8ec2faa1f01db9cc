"""Model folders of the published sizes without weights, for `--load-format dummy`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from transformers import Qwen2_5_VLConfig, Qwen2Tokenizer, Qwen3Config, UMT5Config

from benchmarks.published import TRANSFORMERS, Config
from testbed.tiny_models import SCHEDULER, tiny_tokenizer
from testbed.tiny_text_encoders import t5_fields, t5_tokenizer
from testbed.tiny_wan import tiny_wan_vae
from testbed.tiny_z_image import CHAT_TEMPLATE, TURBO_SHIFT

SHALLOW, SHALLOW_BLOCKS = "-8", 8
MODELS: dict[str, Config] = {
    **TRANSFORMERS,
    f"wan-14b{SHALLOW}": {**TRANSFORMERS["wan-14b"], "num_layers": SHALLOW_BLOCKS},
}
"""Transformers by name. `wan-14b-8` has a fifth of the blocks: all take the same time, so a fifth of a step will do."""
_TINY_WAN: Config = {
    **TRANSFORMERS["wan-1.3b"],
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "ffn_dim": 96,
    "text_dim": 32,
    "freq_dim": 64,
}
TINY_TRANSFORMERS: dict[str, Config] = {
    "qwen-image": {
        **TRANSFORMERS["qwen-image"],
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 32,
        "axes_dims_rope": [4, 6, 6],
    },
    "z-image": {
        **TRANSFORMERS["z-image"],
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 4,
        "cap_feat_dim": 32,
        "axes_dims": [4, 6, 6],
    },
    **dict.fromkeys(("wan-1.3b", "wan-14b", f"wan-14b{SHALLOW}"), _TINY_WAN),
}
"""Small configs for trying the benchmarks."""


def transformer_config(name: str, tiny: bool) -> Config:
    return (TINY_TRANSFORMERS if tiny else MODELS)[name]


def write_model(name: str, path: Path, tiny: bool) -> Path:
    """Write the folder of one of `MODELS` to `path` unless it exists; return it."""
    if (path / "model_index.json").is_file():
        return path
    write = {"qwen-image": _qwen_image, "z-image": _z_image}.get(name, _wan)
    components = write(path, tiny)
    _write_json(path / "transformer" / "config.json", transformer_config(name, tiny))
    if tiny:
        few_frames = {"num_frames": 5} if write is _wan else {}
        _write_json(path / "default_sampling_params.json", {"height": 64, "width": 64, **few_frames})
    _write_json(path / "model_index.json", components)  # last: the folder is complete
    return path


def _qwen_image(path: Path, tiny: bool) -> dict[str, Any]:
    """Write Qwen/Qwen-Image, with Qwen2.5-VL-7B as text encoder; return its components."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(path / "tokenizer")
    width, layers, heads, kv_heads, inner = (32, 2, 2, 1, 64) if tiny else (3584, 28, 28, 4, 18944)
    text = {
        **_text_sizes(tokenizer, tiny, 152064, width, layers, heads, kv_heads, inner),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [2, 3, 3] if tiny else [16, 24, 24],
        },
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": width}
    Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False).save_pretrained(
        path / "text_encoder"
    )
    sizes = {"base_dim": 8, "num_res_blocks": 1} if tiny else {}
    with torch.device("meta"):
        AutoencoderKLQwenImage(**sizes).save_config(path / "vae")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(path / "scheduler")
    return {
        "_class_name": "QwenImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }


def _z_image(path: Path, tiny: bool) -> dict[str, Any]:
    """Write Tongyi-MAI/Z-Image-Turbo, with Qwen3-4B as text encoder and FLUX's VAE; return its components."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path / "tokenizer")
    width, layers, heads, kv_heads, inner = (32, 3, 2, 1, 64) if tiny else (2560, 36, 32, 8, 9728)
    sizes = _text_sizes(tokenizer, tiny, 151936, width, layers, heads, kv_heads, inner)
    Qwen3Config(**sizes, head_dim=16 if tiny else 128).save_pretrained(path / "text_encoder")
    channels = [8, 16, 16, 16] if tiny else [128, 256, 512, 512]
    with torch.device("meta"):
        AutoencoderKL(
            latent_channels=16,
            block_out_channels=channels,
            layers_per_block=1 if tiny else 2,
            norm_num_groups=4 if tiny else 32,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            sample_size=1024,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).save_config(path / "vae")
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=TURBO_SHIFT).save_pretrained(path / "scheduler")
    return {
        "_class_name": "ZImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _wan(path: Path, tiny: bool) -> dict[str, Any]:
    """Write a Wan 2.1 text-to-video model; return its components.

    Its UMT5 has the published width, but two layers of 24: the encode of the text is not what is measured.
    """
    tokenizer = t5_tokenizer()
    tokenizer.save_pretrained(path / "tokenizer")
    width, heads, head_dim, inner = (32, 2, 16, 64) if tiny else (4096, 64, 64, 10240)
    text = {**t5_fields(tokenizer, width), "num_heads": heads, "d_kv": head_dim, "d_ff": inner}
    UMT5Config(**text).save_pretrained(path / "text_encoder")
    with torch.device("meta"):
        (tiny_wan_vae() if tiny else AutoencoderKLWan()).save_config(path / "vae")
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    ).save_pretrained(path / "scheduler")
    return {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "boundary_ratio": None,
        "expand_timesteps": False,
    }


def _text_sizes(
    tokenizer: Qwen2Tokenizer,
    tiny: bool,
    vocab: int,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    inner: int,
) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer) if tiny else vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.eos_token_id,
    }


def _write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1))
