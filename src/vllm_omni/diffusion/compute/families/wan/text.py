"""Wan's text encoder: UMT5, shared by the ranks of a group."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5Stack

from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.families.wan.prompts import WanTokenizer
from vllm_omni.diffusion.compute.layers.linear import ColumnEmbedding, ColumnLinear, RowLinear
from vllm_omni.diffusion.compute.weights.reader import WeightReader

EMBEDDINGS = ("shared", "encoder.embed_tokens")
"""Names of the embedding in a checkpoint: one of them, or both for the same weight."""
ATTENTION, MLP = "layer.0.SelfAttention", "layer.1.DenseReluDense"
COLUMN_LAYERS = (*(f"{ATTENTION}.{name}" for name in "qkv"), f"{MLP}.wi_0", f"{MLP}.wi_1")
ROW_LAYERS = (f"{ATTENTION}.o", f"{MLP}.wo")


class HeadBiases(nn.Embedding):
    """Biases of attention scores by distance, for this rank's heads: [...] -> [..., heads / size].

    weight: [distances, heads / size].
    """

    cut_dims: ClassVar[Mapping[str, int]] = {"weight": 1}

    def __init__(self, num_distances: int, num_heads: int, group: Group) -> None:
        """Biases of `num_heads` heads over all ranks, whose number divides them."""
        super().__init__(num_distances, num_heads // group.size)
        self.group = group


class WanTextEncoder:
    """Encodes prompts."""

    def __init__(self, path: Path, reader: WeightReader, group: Group) -> None:
        """Read this rank's share of the weights in the model folder `path`. group: ranks that share them.

        Raises ConfigError for a checkpoint that does not fit.
        """
        self._device = reader.device
        self._tokenizer = WanTokenizer(path / "tokenizer")
        folder = path / "text_encoder"
        config = UMT5Config.from_pretrained(folder)
        config.use_cache = config.is_encoder_decoder = False
        with torch.device("meta"):
            encoder = UMT5Stack(config)
            _share(encoder, group)
            # The stack gets embedded tokens, so that the embedding is one module under one name.
            del encoder.embed_tokens
            embedding = ColumnEmbedding(config.vocab_size, config.d_model, group)
            model = nn.ModuleDict({"shared": embedding, "encoder": encoder})
        names = reader.names(folder)
        stored = next((name for name in EMBEDDINGS if f"{name}.weight" in names), EMBEDDINGS[0])
        unread = tuple(f"{name}." for name in EMBEDDINGS if name != stored)
        reader.load(model, folder, {"shared": (stored,)}, unread=unread)
        # The model has another embedding where it is kept compressed.
        self._embedding, self._encoder = model["shared"], encoder

    def __call__(self, prompt: str, max_tokens: int) -> Tensor:
        """Hidden states [tokens, d_model] of the prompt, cut to `max_tokens` tokens.

        All ranks of the group must call with the same arguments; each gets the states.
        """
        ids = to_device(torch.tensor([self._tokenizer.ids(prompt, max_tokens)]), self._device)
        states: Tensor = self._encoder(inputs_embeds=self._embedding(ids)).last_hidden_state[0]
        return states


def _share(encoder: UMT5Stack, group: Group) -> None:
    """Replace the layers of `encoder` by layers that are shared by the ranks of `group`."""
    for block in encoder.block:
        for names, shared in ((COLUMN_LAYERS, ColumnLinear), (ROW_LAYERS, RowLinear)):
            for name in names:
                linear = block.get_submodule(name)
                block.set_submodule(name, shared(linear.in_features, linear.out_features, group, bias=False))
        attention = block.get_submodule(ATTENTION)
        attention.relative_attention_bias = HeadBiases(
            attention.relative_attention_num_buckets, attention.n_heads, group
        )
        attention.n_heads //= group.size
        attention.inner_dim //= group.size
