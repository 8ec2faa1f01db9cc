"""Facts of a Qwen-Image model, read from its configs (no torch at import)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.catalog.configs import check_config_values, read_config, read_scheduler_config
from vllm_omni.diffusion.catalog.default_params import read_default_sampling_params
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo, Shares
from vllm_omni.diffusion.catalog.tea_cache_file import read_tea_cache_coefficients
from vllm_omni.diffusion.catalog.tokenizer_files import TokenizerNeeds
from vllm_omni.diffusion.compute.families.qwen_image.config import (
    QwenImageConfig,
    QwenImageVaeConfig,
    QwenImageVisionConfig,
)
from vllm_omni.diffusion.compute.families.qwen_image.edit import (
    EDIT_TEMPLATE,
    IMAGE_TOKEN,
    NUM_EDIT_TEMPLATE_TOKENS,
    EditInput,
)
from vllm_omni.diffusion.compute.text.language_config import LanguageModelConfig
from vllm_omni.diffusion.compute.text.tokenizers import load_tokenizer

PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
"""Template around a prompt, as in diffusers' QwenImagePipeline; the model was trained with it."""
NUM_TEMPLATE_TOKENS = 34
"""Tokens of the template before the prompt, whose hidden states are dropped."""
MAX_PROMPT_TOKENS = 1024
"""Most tokens of a prompt with the end of the template: diffusers' limit, also of max_sequence_length."""
TEA_CACHE_COEFFICIENTS = (-450.0, 280.0, -45.0, 3.2, -0.02)
"""Coefficients of the published TeaCache for Qwen-Image; not measured on other weights of this architecture."""
PATCH_SIZE = 2
"""Side of a token in latent pixels."""
PROMPT_TOKENS = ("<|im_start|>", "<|im_end|>")
EDIT_PROMPT_TOKENS = (*PROMPT_TOKENS, "<|vision_start|>", "<|vision_end|>", IMAGE_TOKEN)
TEXT_TO_IMAGE, EDIT_PLUS = "QwenImagePipeline", "QwenImageEditPlusPipeline"
DEFAULT_LATENT_SIDE = 128
"""Side of the default picture in latent pixels."""
AVAILABLE = {
    "use_additional_t_cond": False,
    "use_layer3d_rope": False,
    "guidance_embeds": False,
    "patch_size": PATCH_SIZE,
}
"""Keys of transformer/config.json and the only value of each that this package computes."""


@dataclass(frozen=True)
class TemplateTokenCounter:
    """Counts the text tokens of the transformer: those of the prompt and of the end of the template."""

    tokenizer_path: Path
    template: str = PROMPT_TEMPLATE
    num_template_tokens: int = NUM_TEMPLATE_TOKENS

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer_path)

    def __call__(self, prompt: str) -> int:
        return len(self._tokenizer(self.template.format(prompt)).input_ids) - self.num_template_tokens


def describe(path: Path) -> PackedModelInfo:
    """Facts of the model in `path`.

    Raises ConfigError for a component whose config cannot be read and for a variant that the family does not compute.
    """
    values = read_config(path, "transformer")
    check_config_values(values, AVAILABLE)
    transformer = QwenImageConfig.from_dict(values)
    vae = QwenImageVaeConfig.from_dict(read_config(path, "vae"))
    text_encoder_values = read_config(path, "text_encoder")
    text_encoder = LanguageModelConfig.from_dict(text_encoder_values)
    read_scheduler_config(path)
    vae_scale = vae.scale
    text_weights = [text_encoder.expected_weights(has_biases=True, has_head_norms=False)]
    defaults = {
        "height": DEFAULT_LATENT_SIDE * vae_scale,
        "width": DEFAULT_LATENT_SIDE * vae_scale,
        "num_inference_steps": 50,
        "true_cfg_scale": 4.0,
        "max_sequence_length": 512,
    } | read_default_sampling_params(path)
    count_prompt_tokens, image_input = TemplateTokenCounter(path / "tokenizer"), None
    if (class_name := read_config(path, "", "model_index.json").get("_class_name")) != TEXT_TO_IMAGE:
        count_prompt_tokens = TemplateTokenCounter(path / "tokenizer", EDIT_TEMPLATE, NUM_EDIT_TEMPLATE_TOKENS)
        text_weights.append(QwenImageVisionConfig.from_dict(text_encoder_values).expected_weights())
        image_input = EditInput(
            processor_path=path / "processor",
            count_text_tokens=count_prompt_tokens,
            area=int(defaults["height"]) * int(defaults["width"]),
            is_plus=class_name == EDIT_PLUS,
        )
    return PackedModelInfo(
        path=path,
        family="qwen_image",
        size_multiple=vae_scale * PATCH_SIZE,
        pixels_per_token=vae_scale * PATCH_SIZE,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        count_prompt_tokens=count_prompt_tokens,
        # A token costs 24 width² in a block's linear layers and 4 width n in attention over n tokens.
        attention_tokens=6.0 * transformer.dim,
        num_heads=transformer.num_attention_heads,
        head_dim=transformer.attention_head_dim,
        num_blocks=transformer.num_layers,
        num_streams=2,
        tea_cache_coefficients=read_tea_cache_coefficients(path, TEA_CACHE_COEFFICIENTS),
        # The MLP is four times as wide as all heads together.
        tensor_shares=Shares({"attention heads": transformer.num_attention_heads}),
        text_encoder_shares=text_encoder.shares,
        tokenizer_needs=TokenizerNeeds(
            PROMPT_TOKENS if image_input is None else EDIT_PROMPT_TOKENS, text_encoder.vocab_size
        ),
        vae=vae,
        expected_weights={
            "transformer": [transformer.expected_weights()],
            "vae": [vae.expected_weights()],
            "text_encoder": text_weights,
        },
        image_input=image_input,
        default_sampling_params=defaults,
    )
