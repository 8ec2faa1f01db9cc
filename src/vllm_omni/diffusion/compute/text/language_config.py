"""Sizes of a Qwen text encoder, and the weights that it must have. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.diffusion.catalog.configs import from_values
from vllm_omni.diffusion.catalog.expected_weights import ExpectedWeights, LayerList
from vllm_omni.diffusion.catalog.packed_info import Shares
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.field_values import shown

CONFIG_FILE = "text_encoder/config.json"
EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class LanguageModelConfig:
    """Keys of text_encoder/config.json, or of its section `text_config`, that decide the shapes of the weights."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    """Channels of one attention head; None: hidden_size / num_attention_heads."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LanguageModelConfig:
        """Read a parsed config.json. Raises ConfigError for sizes that are missing, not integers, or do not divide."""
        # Older configs have the keys of the language model at the top level.
        section = values.get("text_config") or values
        if not isinstance(section, dict):
            raise ConfigError(f"{CONFIG_FILE}: text_config takes a JSON object, got {shown(section)}")
        config = from_values(cls, section, CONFIG_FILE)
        for name, count in (("hidden_size", config.hidden_size), ("num_key_value_heads", config.num_key_value_heads)):
            larger, smaller = max(count, config.num_attention_heads), min(count, config.num_attention_heads)
            if larger % smaller and (name != "hidden_size" or config.head_dim is None):
                raise ConfigError(
                    f"{CONFIG_FILE}: {name} {count} and num_attention_heads {config.num_attention_heads} do not divide"
                )
        return config

    @property
    def shares(self) -> Shares:
        """Numbers that the number of ranks must divide."""
        return Shares(
            {
                "attention heads": self.num_attention_heads,
                "key and value heads": self.num_key_value_heads,
                "MLP channels": self.intermediate_size,
            }
        )

    def expected_weights(self, *, has_biases: bool, has_head_norms: bool) -> ExpectedWeights:
        """Shapes of the weights up to the last layer, by their names in transformers.

        has_biases: queries, keys and values have biases (Qwen2); has_head_norms: the heads of queries and keys are
        normalized (Qwen3).
        """
        width, inner = self.hidden_size, self.intermediate_size
        head = self.head_dim or width // self.num_attention_heads
        queries, keys = self.num_attention_heads * head, self.num_key_value_heads * head
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (queries, width),
            "self_attn.k_proj.weight": (keys, width),
            "self_attn.v_proj.weight": (keys, width),
            "self_attn.o_proj.weight": (width, queries),
            "mlp.gate_proj.weight": (inner, width),
            "mlp.up_proj.weight": (inner, width),
            "mlp.down_proj.weight": (width, inner),
        }
        if has_biases:
            layer |= {f"self_attn.{name}_proj.bias": (n,) for name, n in (("q", queries), ("k", keys), ("v", keys))}
        if has_head_norms:
            layer |= {f"self_attn.{name}_norm.weight": (head,) for name in "qk"}
        return ExpectedWeights(
            {EMBEDDING: (self.vocab_size, width)},
            {"layers": LayerList("num_hidden_layers", self.num_hidden_layers, layer)},
            anchor=EMBEDDING,
        )
