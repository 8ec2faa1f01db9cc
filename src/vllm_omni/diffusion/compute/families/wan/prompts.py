"""Prompts of Wan as its tokenizer reads them: cleaned as in diffusers' WanPipeline (no torch at import)."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ftfy import fix_text

from vllm_omni.diffusion.compute.text.tokenizers import load_tokenizer


def clean_prompt(prompt: str) -> str:
    """Prompt with mended encoding, without HTML entities and repeated white space."""
    # Twice, for entities of entities such as `&amp;lt;`.
    text = html.unescape(html.unescape(fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


@dataclass(frozen=True)
class WanTokenizer:
    """Token ids of cleaned prompts, each with the token of its end."""

    path: Path

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.path)

    def ids(self, prompt: str, max_tokens: int) -> list[int]:
        """Ids of the first `max_tokens` tokens of the prompt; the last is the token of its end."""
        ids = self._tokenizer(clean_prompt(prompt), max_length=max_tokens, truncation=True).input_ids
        return list(ids)

    def __call__(self, prompt: str) -> int:
        """Number of tokens of the prompt."""
        return len(self._tokenizer(clean_prompt(prompt)).input_ids)
