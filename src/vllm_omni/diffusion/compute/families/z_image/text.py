"""Z-Image's text encoder: a Qwen3 language model without its last layer, as in diffusers' ZImagePipeline.

The last layer, the norm after it and the output layer are not read.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.families.z_image.info import ChatTokenizer
from vllm_omni.diffusion.compute.text.language_model import load_language_model
from vllm_omni.diffusion.compute.weights.reader import WeightReader


class ZImageTextEncoder:
    """Encodes prompts."""

    def __init__(self, path: Path, reader: WeightReader, group: Group) -> None:
        """Read this rank's share of the weights in the model folder `path`. group: ranks that share them.

        Raises ConfigError for a checkpoint that does not fit.
        """
        self._device = reader.device
        self._tokenizer = ChatTokenizer(path / "tokenizer")
        config = Qwen3Config.from_pretrained(path / "text_encoder")

        def build() -> Qwen3Model:
            model = Qwen3Model(config)
            model.layers, model.norm = model.layers[:-1], nn.Identity()
            return model

        unread = (f"layers.{config.num_hidden_layers - 1}.", "norm.", "lm_head.")
        self._model = load_language_model(build, path / "text_encoder", reader, group, unread)

    def __call__(self, prompt: str) -> Tensor:
        """Hidden states [tokens, hidden size] of the prompt as a chat, after the last layer but one.

        All ranks of the group must call with the same prompt; each gets the states.
        """
        ids = to_device(torch.tensor([self._tokenizer.ids(prompt)]), self._device)
        # A single prompt needs only the causal mask. Without `masks` transformers would read the ids from the device.
        masks = {"full_attention": None}
        states: Tensor = self._model(input_ids=ids, attention_mask=masks, use_cache=False).last_hidden_state
        return states[0]
