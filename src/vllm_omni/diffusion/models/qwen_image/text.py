"""Qwen-Image's text encoder: Qwen2.5-VL's language model, as diffusers' QwenImagePipeline uses it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from vllm_omni.diffusion.models.qwen_image.info import MAX_PROMPT_TOKENS, NUM_TEMPLATE_TOKENS, PROMPT_TEMPLATE


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """The worker shows one bar for all weights."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


class TextEncoder:
    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer")
        with _no_progress_bar():
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                path / "text_encoder", dtype=dtype, device_map={"": device}, use_safetensors=True
            )
        # Text alone needs neither the vision tower nor the scores over the vocabulary.
        self._model = model.model.language_model.eval().requires_grad_(False)

    def __call__(self, prompt: str) -> Tensor:
        """-> [tokens, hidden size]: the last hidden states without the template's beginning."""
        ids = self._tokenizer(
            PROMPT_TEMPLATE.format(prompt),
            max_length=MAX_PROMPT_TOKENS + NUM_TEMPLATE_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        states: Tensor = self._model(input_ids=ids.to(self._device), use_cache=False).last_hidden_state
        return states[0, NUM_TEMPLATE_TOKENS:]
