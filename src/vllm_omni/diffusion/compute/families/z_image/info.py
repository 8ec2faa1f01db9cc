"""Facts of a Z-Image model, read from its configs (no torch at import)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.catalog.configs import check_config_values, read_config, read_scheduler_config
from vllm_omni.diffusion.catalog.default_params import read_default_sampling_params
from vllm_omni.diffusion.catalog.model_info import Guidance
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo, Shares
from vllm_omni.diffusion.catalog.tea_cache_file import read_tea_cache_coefficients
from vllm_omni.diffusion.catalog.tokenizer_files import TokenizerNeeds, check_chat_template
from vllm_omni.diffusion.compute.families.z_image.config import PATCH_SIZE, ZImageConfig, ZImageVaeConfig
from vllm_omni.diffusion.compute.text.language_config import LanguageModelConfig
from vllm_omni.diffusion.compute.text.tokenizers import load_tokenizer
from vllm_omni.errors import ConfigError

TOKEN_MULTIPLE = 32
"""Captions and pictures are padded to a multiple of this many tokens, with learned tokens that attend."""
AVAILABLE = {
    "all_patch_size": [PATCH_SIZE],
    "all_f_patch_size": [1],
    "qk_norm": True,
    "siglip_feat_dim": None,
}
"""Keys of transformer/config.json and the only value of each that this package computes."""
PROMPT_TOKENS = ("<|im_start|>", "<|im_end|>")
DEFAULT_SIDE = 1024
TEA_CACHE_COEFFICIENTS = (-450.0, 280.0, -45.0, 3.2, -0.02)
"""Coefficients published for Qwen-Image, which other servers use for Z-Image too; none measured on Z-Image are
published. `vllm-omni calibrate-teacache` measures them on the served model."""
MOST_TENSOR_RANKS = 2
DISTILLED_SHIFT = 3.0
"""Shift of Z-Image-Turbo's schedule; Z-Image's is 6. No other value of the configs differs between the two."""


@dataclass(frozen=True)
class ChatTokenizer:
    """Tokens of a prompt as the only message of a chat, the input of the text encoder."""

    path: Path

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.path)
        try:
            _as_chat(tokenizer, "a prompt")
        except Exception as error:  # a template is a program: its errors are of any class
            raise ConfigError(f"{self.path.name}/: the chat template fails: {error!r}") from error
        return tokenizer

    def ids(self, prompt: str) -> list[int]:
        """Token ids of the prompt, as in diffusers' ZImagePipeline."""
        return list(self._tokenizer(_as_chat(self._tokenizer, prompt)).input_ids)

    def __call__(self, prompt: str) -> int:
        """Number of tokens of the prompt."""
        return len(self.ids(prompt))


def _as_chat(tokenizer: Any, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    return text


def describe(path: Path) -> PackedModelInfo:
    """Facts of the model in `path`.

    Raises ConfigError for a component whose config cannot be read and for a variant that the family does not compute.
    """
    values = read_config(path, "transformer")
    check_config_values(values, AVAILABLE)
    transformer = ZImageConfig.from_dict(values)
    vae = ZImageVaeConfig.from_dict(read_config(path, "vae"))
    text_encoder = LanguageModelConfig.from_dict(read_config(path, "text_encoder"))
    side = PATCH_SIZE * vae.scale
    # The frame of a picture is the position after its caption, and axes_lens bounds positions.
    longest = transformer.axes_lens[0] - 2
    is_distilled = read_scheduler_config(path).shift == DISTILLED_SHIFT
    defaults = {
        "height": DEFAULT_SIDE,
        "width": DEFAULT_SIDE,
        "num_inference_steps": 8 if is_distilled else 50,
        "guidance_scale": 0.0 if is_distilled else 5.0,
        "max_sequence_length": 512,
    }
    check_chat_template(path, "tokenizer")
    return PackedModelInfo(
        path=path,
        family="z_image",
        size_multiple=side,
        pixels_per_token=side,
        max_prompt_tokens=longest // TOKEN_MULTIPLE * TOKEN_MULTIPLE,
        count_prompt_tokens=ChatTokenizer(path / "tokenizer"),
        # A token costs 24 width² in a block's linear layers and 4 width n in attention over n tokens.
        attention_tokens=6.0 * transformer.dim,
        num_heads=transformer.n_heads,
        head_dim=transformer.head_dim,
        num_blocks=transformer.n_layers,
        tea_cache_coefficients=read_tea_cache_coefficients(path, TEA_CACHE_COEFFICIENTS),
        tensor_shares=Shares(
            {"attention heads": transformer.n_heads, "MLP channels": transformer.inner_width}, MOST_TENSOR_RANKS
        ),
        text_encoder_shares=text_encoder.shares,
        tokenizer_needs=TokenizerNeeds(PROMPT_TOKENS, text_encoder.vocab_size),
        vae=vae,
        expected_weights={
            "transformer": [transformer.expected_weights()],
            "vae": [vae.expected_weights()],
            "text_encoder": [text_encoder.expected_weights(has_biases=False, has_head_norms=True)],
        },
        guidance=Guidance("guidance_scale", 1.0, "", ("cfg_normalization", "cfg_truncation")),
        token_multiple=TOKEN_MULTIPLE,
        default_sampling_params=defaults | read_default_sampling_params(path),
    )
