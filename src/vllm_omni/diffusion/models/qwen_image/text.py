"""Qwen-Image's text encoder: Qwen2.5-VL's language model, as diffusers' QwenImagePipeline uses it.

Text alone needs neither the vision tower nor the scores over the vocabulary, so they are not read. The ranks of a group
share the rest: each holds some heads of every attention, some features of every MLP and of the embedding. Exchanges
go through the group, not through process groups kept in the model, so the weights outlive a broken connection.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLTextModel

from vllm_omni.diffusion.distributed.groups import Group
from vllm_omni.diffusion.layers.linear import ColumnEmbedding, ColumnLinear, RowLinear
from vllm_omni.diffusion.models.loading import OnBytes, load_weights, weight_names
from vllm_omni.diffusion.models.qwen_image.info import (
    MAX_PROMPT_TOKENS,
    NUM_TEMPLATE_TOKENS,
    PROMPT_TEMPLATE,
)

COLUMN_LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROW_LAYERS = ("self_attn.o_proj", "mlp.down_proj")


class TextEncoder:
    """Of prompts alone; `vision.EditEncoder` is its like for pictures to edit."""

    def __init__(
        self,
        path: Path,
        device: torch.device,
        dtype: torch.dtype,
        group: Group,
        on_bytes: OnBytes = lambda count: None,
    ) -> None:
        """Reads this rank's share of the weights in `path`, a model folder; `on_bytes` is told how much that is.

        Raises ConfigError for a checkpoint that does not fit.
        """
        self._device = device
        self._tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer")
        self._model = load_language_model(path / "text_encoder", device, dtype, group, on_bytes)

    def __call__(self, prompt: str) -> Tensor:
        """-> [tokens, hidden size]: the last hidden states without the template's beginning.

        All ranks of the group must call with the same prompt; each gets the states.
        """
        ids = self._tokenizer(
            PROMPT_TEMPLATE.format(prompt),
            max_length=MAX_PROMPT_TOKENS + NUM_TEMPLATE_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        states: Tensor = self._model(input_ids=ids.to(self._device), use_cache=False).last_hidden_state
        return states[0, NUM_TEMPLATE_TOKENS:]


def load_language_model(
    folder: Path, device: torch.device, dtype: torch.dtype, group: Group, on_bytes: OnBytes
) -> Qwen2_5_VLTextModel:
    """This rank's share of the language model in `folder`, a text encoder's."""
    config = Qwen2_5_VLConfig.from_pretrained(folder).text_config
    with torch.device("meta"):
        model = Qwen2_5_VLTextModel(config)
        _share(model, group)
    # Checkpoints have been written with two names for the same module.
    is_named = any(name.startswith("model.language_model.") for name in weight_names(folder))
    prefix = "model.language_model." if is_named else "model."
    load_weights(model, folder, {}, device, dtype, on_bytes, prefix)
    # Its frequencies are no weights, and stay in float32 whatever the model's dtype.
    model.rotary_emb = type(model.rotary_emb)(config).to(device)
    return model


def _share(model: Qwen2_5_VLTextModel, group: Group) -> None:
    """Put layers that the ranks of `group` share in place of the whole ones."""
    embedding = model.embed_tokens
    model.embed_tokens = ColumnEmbedding(embedding.num_embeddings, embedding.embedding_dim, group)
    for layer in model.layers:
        for names, shared in ((COLUMN_LAYERS, ColumnLinear), (ROW_LAYERS, RowLinear)):
            for name in names:
                linear = layer.get_submodule(name)
                has_bias = linear.bias is not None
                layer.set_submodule(name, shared(linear.in_features, linear.out_features, group, has_bias))
