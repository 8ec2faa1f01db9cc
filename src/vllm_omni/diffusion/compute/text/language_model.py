"""Text encoders that are Qwen language models, sharded over the ranks of a group.

Each rank holds some heads of every attention, and some features of every MLP and of the embedding. Exchanges use the
group and no process group stored in the model, so the weights stay usable after a reconnection.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.layers.linear import ColumnEmbedding, ColumnLinear, RowLinear
from vllm_omni.diffusion.compute.text.language_config import EMBEDDING
from vllm_omni.diffusion.compute.weights.reader import WeightReader

COLUMN_LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROW_LAYERS = ("self_attn.o_proj", "mlp.down_proj")


def load_language_model(
    build: Callable[[], Any],
    folder: Path,
    reader: WeightReader,
    group: Group,
    unread: tuple[str, ...] = (),
) -> Any:
    """This rank's shard of a model like Qwen2 that `build` makes. unread: see `load_weights`. Raises ConfigError."""
    with torch.device("meta"):
        model = build()
        _shard(model, group)
    # Checkpoints differ in the prefix of the language model's names; their other parts are not read.
    names = reader.names(folder)
    prefix = next((name.removesuffix(EMBEDDING) for name in names if name.endswith(EMBEDDING)), "")
    reader.load(model, folder, {}, prefix, unread)
    # The rotary frequencies are not in the checkpoint, and stay in float32 for any dtype of the model.
    model.rotary_emb = type(model.rotary_emb)(model.config).to(reader.device)
    return model


def _shard(model: Any, group: Group) -> None:
    """Replace the layers of `model` by layers that are sharded over `group`."""
    embedding = model.embed_tokens
    model.embed_tokens = ColumnEmbedding(embedding.num_embeddings, embedding.embedding_dim, group)
    for layer in model.layers:
        for names, shared in ((COLUMN_LAYERS, ColumnLinear), (ROW_LAYERS, RowLinear)):
            for name in names:
                linear = layer.get_submodule(name)
                has_bias = linear.bias is not None
                layer.set_submodule(name, shared(linear.in_features, linear.out_features, group, has_bias))
