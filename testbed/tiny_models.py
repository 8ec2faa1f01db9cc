"""Tiny random models in the diffusers layout, built from nothing in a moment: no download, no weights in the repo.

Every parameter is random, norms and biases too, so that a forgotten one changes the pixels.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

from vllm_omni.diffusion.compute.families.qwen_image.edit import EDIT_TEMPLATE
from vllm_omni.diffusion.compute.families.qwen_image.info import PROMPT_TEMPLATE

WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
SMALL: dict[str, object] = {"height": 64, "width": 64}
"""Sampling parameters of a model whose warm-up takes a moment: it draws what is drawn by default."""
# The scheduler settings of Qwen/Qwen-Image.
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}


def build_tiny_qwen_image(
    path: Path,
    *,
    heads: int = 3,
    head_dim: int = 16,
    layers: int = 2,
    text_dim: int = 32,
    text_heads: int = 2,
    text_kv_heads: int = 1,
    vae_dim: int = 8,
    seed: int = 0,
    time_scale: float = 1.0,
    edit: str | None = None,
    zero_cond_t: bool = False,
    default_sampling_params: dict[str, object] | None = None,
) -> Path:
    """Write a QwenImagePipeline folder to `path` and return it. Widths: heads * head_dim, and text_dim.

    edit: the class name of the editing pipeline that the folder is of instead.
    text_dim: a multiple of 16 * text_heads. time_scale: how much the timestep matters; with 1 a random model is
    another one at each step, a trained one changes slowly.
    """
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    components = {
        "tokenizer": tokenizer,
        "text_encoder": tiny_text_encoder(tokenizer, text_dim, text_heads, text_kv_heads),
        "transformer": tiny_transformer(
            heads=heads, head_dim=head_dim, layers=layers, text_dim=text_dim, zero_cond_t=zero_cond_t
        ),
        "vae": AutoencoderKLQwenImage(
            base_dim=vae_dim, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULER),
    }
    for name in ("text_encoder", "vae"):
        randomize(components[name])
    with torch.no_grad():
        components["transformer"].time_text_embed.timestep_embedder.linear_1.weight.mul_(time_scale)
    if edit is not None:
        # At most 16 tokens a picture: a vision tower takes its time.
        sizes = {"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28}
        components["processor"] = Qwen2VLImageProcessorPil(size=sizes)
    index: dict[str, object] = {"_class_name": edit or "QwenImagePipeline", "_diffusers_version": "0.42.1"}
    for name, component in components.items():
        component.save_pretrained(path / name)
        library = type(component).__module__.partition(".")[0]
        index[name] = [library, type(component).__name__]
    (path / "model_index.json").write_text(json.dumps(index))
    if default_sampling_params is not None:
        (path / "default_sampling_params.json").write_text(json.dumps(default_sampling_params))
    torch.set_rng_state(generator_state)
    return path


def tiny_transformer(
    *, heads: int, head_dim: int = 16, layers: int = 2, text_dim: int = 32, zero_cond_t: bool = False
) -> QwenImageTransformer2DModel:
    """A random diffusers transformer; head_dim a multiple of 8."""
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=text_dim,
        axes_dims_rope=(head_dim // 4, head_dim // 2 - head_dim // 8, head_dim // 2 - head_dim // 8),
        zero_cond_t=zero_cond_t,
    ).eval()
    return randomize(transformer)


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter random values of a size that keeps activations near 1."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() > 1 and min(parameter.shape) > 1 and "norm" not in name:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                is_scale = name.endswith(("weight", "gamma"))
                parameter.copy_(noise * 0.1 + (1.0 if is_scale else 0.0))
    return module


def tiny_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE in which every word of the prompt template is one token: diffusers drops a fixed number."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1000, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    templates = (PROMPT_TEMPLATE + EDIT_TEMPLATE).replace("{}", "")
    words = [part for part in re.split(r"<\|[a-z_]+\|>", templates) if part]
    tokenizer.train_from_iterator([*words * 200, "a photo of a red apple and a blue car"], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = model["vocab"]
    for token in SPECIAL_TOKENS:
        vocab.setdefault(token, len(vocab))
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        extra_special_tokens=SPECIAL_TOKENS[1:],
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        padding_side="right",
        model_max_length=4096,
    )


def tiny_text_encoder(
    tokenizer: Qwen2Tokenizer, width: int, heads: int, kv_heads: int
) -> Qwen2_5_VLForConditionalGeneration:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    head_dim = width // heads
    sections = [head_dim // 8, head_dim // 8 + head_dim // 16, head_dim // 8 + head_dim // 16]
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        vision_token_id=ids["<|vision_pad|>"],
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Coloured noise, smooth as a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
