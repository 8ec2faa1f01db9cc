"""What the front end must know of a Qwen-Image folder, read from its configs alone (no torch at import)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.models.qwen_image.edit import EDIT_TEMPLATE, NUM_EDIT_TEMPLATE_TOKENS, EditInput
from vllm_omni.diffusion.registry import ModelInfo, read_default_sampling_params
from vllm_omni.errors import ConfigError

PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
"""What diffusers' QwenImagePipeline wraps a prompt in; the model was trained on it."""
NUM_TEMPLATE_TOKENS = 34
"""Tokens of the template before the prompt; their hidden states are dropped."""
MAX_PROMPT_TOKENS = 1024
"""diffusers cuts a prompt (with the template's end) here, and takes no larger max_sequence_length."""
PATCH_SIZE = 2
"""Latent pixels a side that one token stands for."""
TEXT_TO_IMAGE, EDIT_PLUS = "QwenImagePipeline", "QwenImageEditPlusPipeline"
DEFAULT_LATENT_SIDE = 128
"""Latent pixels a side of the default picture."""


@dataclass(frozen=True)
class PromptTokenCounter:
    """Counts the text tokens that the transformer sees: the prompt's and the end of the template's."""

    tokenizer_path: Path
    template: str = PROMPT_TEMPLATE
    num_template_tokens: int = NUM_TEMPLATE_TOKENS

    @cached_property
    def _tokenizer(self) -> Any:
        # Lazy: transformers imports torch, and `--help` and validation must not.
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer_path)

    def __call__(self, prompt: str) -> int:
        return len(self._tokenizer(self.template.format(prompt)).input_ids) - self.num_template_tokens


def describe(path: Path) -> ModelInfo:
    """Sizes, limits and defaults of the model in `path`.

    Raises ConfigError for a component whose config cannot be read and for a variant that we cannot run.
    """
    transformer = _read_config(path, "transformer")
    vae = _read_config(path, "vae")
    refuse_unsupported(transformer)
    _refuse_scheduler(_read_config(path, "scheduler", "scheduler_config.json"))
    vae_scale = 2 ** len(vae.get("temperal_downsample", (False, True, True)))
    num_heads = transformer.get("num_attention_heads", 24)
    width = num_heads * transformer.get("attention_head_dim", 128)
    defaults = {
        "height": DEFAULT_LATENT_SIDE * vae_scale,
        "width": DEFAULT_LATENT_SIDE * vae_scale,
        "num_inference_steps": 50,
        "true_cfg_scale": 4.0,
        "max_sequence_length": 512,
    } | read_default_sampling_params(path)
    count_prompt_tokens, image_input = PromptTokenCounter(path / "tokenizer"), None
    if (class_name := _read_config(path, "", "model_index.json").get("_class_name")) != TEXT_TO_IMAGE:
        count_prompt_tokens = PromptTokenCounter(path / "tokenizer", EDIT_TEMPLATE, NUM_EDIT_TEMPLATE_TOKENS)
        image_input = EditInput(
            processor_path=path / "processor",
            count_text_tokens=count_prompt_tokens,
            area=int(defaults["height"]) * int(defaults["width"]),
            is_plus=class_name == EDIT_PLUS,
        )
    return ModelInfo(
        path=path,
        family="qwen_image",
        size_multiple=vae_scale * PATCH_SIZE,
        pixels_per_token=vae_scale * PATCH_SIZE,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        count_prompt_tokens=count_prompt_tokens,
        # A token costs 24 width² in a block's linear layers and 4 width n in attention over n tokens.
        attention_tokens=6.0 * width,
        num_heads=num_heads,
        text_encoder_tp_sizes=text_encoder_tp_sizes(_read_config(path, "text_encoder")),
        image_input=image_input,
        default_sampling_params=defaults,
    )


def refuse_unsupported(transformer: Mapping[str, Any]) -> None:
    """Raise ConfigError for transformer configs of variants that need more than this package computes."""
    for key, only in (
        ("use_additional_t_cond", False),
        ("use_layer3d_rope", False),
        ("guidance_embeds", False),
        ("patch_size", PATCH_SIZE),
    ):
        if (value := transformer.get(key, only)) != only:
            raise ConfigError(f"transformer/config.json has {key}={value!r}: not available yet, only {only!r} is")


def text_encoder_tp_sizes(text_encoder: Mapping[str, Any]) -> tuple[int, ...]:
    """How many ranks can share the text encoder of this config.json: each gets whole heads and as many as the others.

    Raises ConfigError when the config does not say how large the model is.
    """
    common = math.gcd(*_shared_counts(text_encoder).values())
    return tuple(size for size in range(1, common + 1) if common % size == 0)


def _shared_counts(text_encoder: Mapping[str, Any]) -> dict[str, int]:
    # The language model's own section where there is one; older configs have its keys at the top.
    values = text_encoder.get("text_config") or text_encoder
    try:
        return {name: int(values[name]) for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")}
    except (KeyError, TypeError) as error:
        raise ConfigError(f"text_encoder/config.json does not say its sizes: {error!r}") from error


def _refuse_scheduler(scheduler: Mapping[str, Any]) -> None:
    """Only what depends on nothing but the seed: a schedule that draws noise at every step is refused."""
    name, only = scheduler.get("_class_name"), "FlowMatchEulerDiscreteScheduler"
    if name != only or scheduler.get("stochastic_sampling"):
        drawn = " with stochastic_sampling" if scheduler.get("stochastic_sampling") else ""
        raise ConfigError(
            f"scheduler/scheduler_config.json has {name}{drawn}: not available yet, only {only} without is"
        )


def _read_config(path: Path, component: str, name: str = "config.json") -> dict[str, Any]:
    file = path / component / name
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
