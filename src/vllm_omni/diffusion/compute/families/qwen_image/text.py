"""Qwen-Image's text encoder: Qwen2.5-VL's language model, as diffusers' QwenImagePipeline uses it.

Text alone needs neither the vision tower nor the scores over the vocabulary, so they are not read.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextModel

from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.families.qwen_image.info import MAX_PROMPT_TOKENS, NUM_TEMPLATE_TOKENS, PROMPT_TEMPLATE
from vllm_omni.diffusion.compute.text.language_model import load_language_model
from vllm_omni.diffusion.compute.text.tokenizers import load_tokenizer
from vllm_omni.diffusion.compute.weights.reader import WeightReader


class QwenImageTextEncoder:
    """Encodes prompts; `vision.QwenImageEditEncoder` encodes pictures to edit with their prompt."""

    def __init__(self, path: Path, reader: WeightReader, group: Group) -> None:
        """Read this rank's share of the weights in the model folder `path`. group: ranks that share them.

        Raises ConfigError for a checkpoint that does not fit.
        """
        self._device = reader.device
        self._tokenizer = load_tokenizer(path / "tokenizer")
        self._model = load_text_model(path / "text_encoder", reader, group)

    def __call__(self, prompt: str) -> Tensor:
        """Last hidden states [tokens, hidden size], without those of the beginning of the template.

        All ranks of the group must call with the same prompt; each gets the states.
        """
        ids = self._tokenizer(
            PROMPT_TEMPLATE.format(prompt),
            max_length=MAX_PROMPT_TOKENS + NUM_TEMPLATE_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        states: Tensor = self._model(input_ids=to_device(ids, self._device), use_cache=False).last_hidden_state
        return states[0, NUM_TEMPLATE_TOKENS:]


def load_text_model(folder: Path, reader: WeightReader, group: Group) -> Qwen2_5_VLTextModel:
    """This rank's share of the language model in a text encoder's `folder`."""
    config = Qwen2_5_VLConfig.from_pretrained(folder).text_config
    return load_language_model(partial(Qwen2_5_VLTextModel, config), folder, reader, group)
