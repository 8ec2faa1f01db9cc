"""Networks of the demo model: Qwen-Image's classes in small, its scheduler, and a tokenizer from the captions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as vae_module
from diffusers.models.transformers import transformer_qwenimage as dit_module
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

LATENT_CHANNELS = 16
TEXT_WIDTH = 128
VOCABULARY_SIZE = 1400
_SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
)
SPECIAL_TOKENS = _SPECIAL_TOKENS.split()
WORDS = (  # pattern by which Qwen's tokenizer splits text before it merges byte pairs
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# the published scheduler settings of Qwen-Image
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


def prompt_templates() -> tuple[tuple[str, int], tuple[str, int]]:
    """diffusers' templates for text-to-image and edits, each with the number of tokens that it drops at the front."""
    found = []
    for pipeline in (QwenImagePipeline, QwenImageEditPipeline):
        empty = dict.fromkeys(["scheduler", "vae", "text_encoder", "tokenizer", "transformer"])
        if pipeline is QwenImageEditPipeline:
            empty["processor"] = None
        made = pipeline(**empty)
        found.append((made.prompt_template_encode, made.prompt_template_encode_start_idx))
    return found[0], found[1]


def build_tokenizer(captions: Iterable[str]) -> Qwen2Tokenizer:
    """Byte-level BPE in Qwen's format. Its corpus repeats the templates so often that each of their words is one
    token, because diffusers drops a fixed number of tokens from the front of every prompt."""
    (image, image_drop), (edit, edit_drop) = prompt_templates()
    plain = []
    for template in (image, edit):
        for token in SPECIAL_TOKENS:
            template = template.replace(token, "\0")
        plain += [part for part in template.replace("{}", "").split("\0") if part]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY_SIZE, show_progress=False, initial_alphabet=alphabet)
    bpe.train_from_iterator([*(plain * 3000), *captions], trainer)
    learned = json.loads(bpe.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    for token in SPECIAL_TOKENS:
        vocabulary[token] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[tuple(pair) for pair in learned["merges"]],
        extra_special_tokens=SPECIAL_TOKENS[1:],
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        padding_side="right",
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    for template, drop in ((image, image_drop), (edit, edit_drop)):
        front = len(tokenizer(template.split("{}")[0].split("<|vision_start|>")[0]).input_ids)
        if front != drop:
            raise RuntimeError(f"the template has {front} tokens, but the pipeline drops {drop}")
    return tokenizer


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 2 * TEXT_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": TEXT_WIDTH,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        vision_token_id=ids["<|vision_pad|>"],
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def build_transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 20, 20),
    )


def build_autoencoder() -> AutoencoderKLQwenImage:
    """Autoencoder, initialised for one frame, which only the last time slice of a causal 3D convolution reads."""
    vae = AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 3, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.weight.zero_()
                if module.bias is not None:
                    module.bias.zero_()
                used = module.weight[:, :, -1] if module.weight.dim() == 5 else module.weight
                if "time_conv" not in name:
                    used.normal_(0, used[0].numel() ** -0.5)
    close_residual_branches(vae, vae_module.QwenImageResidualBlock, vae_module.QwenImageAttentionBlock)
    return vae


@torch.no_grad()
def close_residual_branches(vae: Any, residual_block: Any, attention_block: Any) -> None:
    """Let a fresh autoencoder start without its residual branches, and with latents that have little noise."""
    for module in vae.modules():
        if isinstance(module, residual_block):
            module.conv2.weight.zero_()
        if isinstance(module, attention_block):
            module.proj.weight.zero_()
    vae.quant_conv.weight[LATENT_CHANNELS:] = 0
    vae.quant_conv.bias[LATENT_CHANNELS:] = -5


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**SCHEDULER)


def use_single_frame_convolutions() -> None:
    """Replace causal 3D convolutions by 2D ones with their last time slice: equal for one frame, and far faster."""
    general = vae_module.QwenImageCausalConv3d.forward

    def forward(self: Any, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        if cache_x is not None or x.shape[2] != 1 or self.stride[0] != 1:
            video: torch.Tensor = general(self, x, cache_x)
            return video
        padding = (self._padding[2], self._padding[0])
        frame: torch.Tensor = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], padding)
        return frame.unsqueeze(2)

    vae_module.QwenImageCausalConv3d.forward = forward


def compile_blocks(transformer: QwenImageTransformer2DModel) -> None:
    """Compile the transformer's blocks once for all sizes of pictures, which the caller marks as dynamic; equal sizes
    are still treated as independent."""
    torch.fx.experimental._config.use_duck_shape = False
    for block in transformer.transformer_blocks:
        block.compile()


def _normalised(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    size = wide.square().mean(1, keepdim=True).clamp_min(1e-24).sqrt()
    return F.silu(wide / size * gamma).to(x.dtype)


def compile_normalisation() -> None:
    """Compile the autoencoder's norms with their activations into one kernel for a single frame, in its dtype."""
    torch.fx.experimental._config.use_duck_shape = False
    torch._dynamo.config.recompile_limit = 64
    general, fused = vae_module.QwenImageResidualBlock.forward, torch.compile(_normalised)

    def normalised(x: torch.Tensor, norm: Any) -> torch.Tensor:
        frame = x[:, :, 0]
        torch._dynamo.mark_static(frame, [0, 1])
        torch._dynamo.mark_dynamic(frame, [2, 3])
        y: torch.Tensor = fused(frame, norm.gamma[:, 0])
        return y.unsqueeze(2)

    def forward(self: Any, x: torch.Tensor, *cache: Any) -> torch.Tensor:
        if any(part is not None for part in cache[:1]):
            video: torch.Tensor = general(self, x, *cache)
            return video
        y = self.conv1(normalised(x, self.norm1))
        z: torch.Tensor = self.conv2(normalised(y, self.norm2)) + self.conv_shortcut(x)
        return z

    vae_module.QwenImageResidualBlock.forward = forward


def use_real_rotary_embedding() -> None:
    """Rotate with real arithmetic, which the compiler can fuse, if the tables are pairs of real numbers."""
    general = dit_module.apply_rotary_emb_qwen

    def rotate(x: torch.Tensor, table: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if table.is_complex():
            rotated: torch.Tensor = general(x, table, **kwargs)
            return rotated
        cos, sin = table[:, None].unbind(-1)
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)

    dit_module.apply_rotary_emb_qwen = rotate


def load_weights(part: Any, folder: Path) -> None:
    """Copy the weights of a saved part of the same shape, whatever their names in the file."""
    part.load_state_dict(type(part).from_pretrained(folder, dtype=torch.float32).state_dict())


def save_pipeline(folder: Path, pipeline: Any, **parts: Any) -> None:
    """Save the parts as this class of pipeline in bf16, without names of this machine's files."""
    for name in ("text_encoder", "vae", "transformer"):
        parts[name] = parts[name].to("cpu", torch.bfloat16).eval()
    pipeline(**parts).save_pretrained(folder, safe_serialization=True)
    for config in [folder / "model_index.json", *folder.glob("*/config.json")]:
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2) + "\n")
