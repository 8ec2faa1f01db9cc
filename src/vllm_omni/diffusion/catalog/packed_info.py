"""Facts of a model that a packed family serves: `ModelInfo` with the sizes of its transformer. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from vllm_omni.diffusion.catalog.model_info import SIZES, ModelInfo
from vllm_omni.diffusion.data import (
    DiffusionParallelConfig,
    OmniDiffusionConfig,
    flag_of,
)
from vllm_omni.errors import ConfigError, NotAvailableError
from vllm_omni.inputs.adapter_files import served_files

PACKED_PARAMETERS = (*SIZES, "num_inference_steps", "negative_prompt", "sigmas", "flow_shift", "max_sequence_length")
"""Sampling parameters of every packed family, besides those of its guidance."""
VIDEO_PARAMETERS = ("num_frames", "seconds", "fps")
"""Sampling parameters of every packed family that makes videos."""


@dataclass(frozen=True)
class Shares:
    """Numbers of ranks that can share the weights of a component evenly."""

    counts: Mapping[str, int]
    """Name of a dimension that the ranks divide, such as `attention heads` -> its length."""
    most: int | None = None
    """Most ranks that the family supports; None: only `counts` limit them."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Valid numbers of ranks, in ascending order."""
        common = math.gcd(*self.counts.values())
        most = common if self.most is None else min(common, self.most)
        return tuple(size for size in range(1, most + 1) if common % size == 0)

    def check(self, flag: str, component: str, size: int) -> None:
        """Raise ConfigError, with the count that forbids it, where `size` ranks cannot share `component`."""
        if size in self.sizes:
            return
        uneven = [f"{count} {name}" for name, count in self.counts.items() if count % size]
        reason = f"cannot be divided by {size}" if uneven else f"are shared by at most {self.most} ranks"
        named = " and ".join(uneven or (f"{count} {name}" for name, count in self.counts.items()))
        valid = ", ".join(map(str, self.sizes))
        raise ConfigError(f"{flag} takes {valid} with {component}, whose {named} {reason}, got {size}")


class VaeSizes(Protocol):
    """Sizes of a VAE, from which the memory of a decode follows."""

    def decode_bytes(self, height: int, width: int, num_frames: int, tile: bool, dtype_bytes: int) -> int:
        """See `PackedModelInfo.decode_bytes`."""


@dataclass(frozen=True, kw_only=True)
class PackedModelInfo(ModelInfo):
    """Facts of a model whose transformer runs on packs."""

    served_by = "packed"
    gives_previews = True
    gives_checkpoints = True
    shares_encodings = True
    decodes_in_pieces = True

    num_heads: int
    """Attention heads of the transformer."""
    head_dim: int
    """Channels of one attention head."""
    num_blocks: int
    """Blocks of the transformer."""
    tensor_shares: Shares
    """Numbers of ranks that can share the transformer's weights."""
    text_encoder_shares: Shares
    """Numbers of ranks that can share the text encoder's weights."""
    tea_cache_coefficients: tuple[float, ...] | None = None
    """TeaCache's polynomial, highest power first; None: nobody has measured it for this model."""
    num_streams: int = 1
    """Sets of weights in a block, of which a token meets one: 2 where text and image tokens have their own."""
    token_multiple: int = 1
    """The model pads text and picture with tokens of its own, each to a multiple of this many tokens."""
    vae: VaeSizes | None = None
    """Sizes of the VAE; None: they are not known, and no decode is tiled before it runs out of memory."""
    cross_attention_tokens: int | None = None
    """Text tokens, with padding, to which each image token attends by cross-attention; a sequence has no text tokens
    then. None: text tokens are part of the sequence."""

    @property
    def parameters(self) -> tuple[str, ...]:
        video = VIDEO_PARAMETERS if self.makes_videos else ()
        return (*self.guidance.parameters, *PACKED_PARAMETERS, *video)

    @property
    def why_no_adapters(self) -> str:
        return ""

    def num_sequence_tokens(self, num_text_tokens: int, num_image_tokens: int) -> int:
        if self.cross_attention_tokens is not None:
            num_text_tokens = 0
        return sum(-(-n // self.token_multiple) * self.token_multiple for n in (num_text_tokens, num_image_tokens))

    def num_encoded_tokens(self, num_prompt_tokens: int) -> int:
        return num_prompt_tokens if self.cross_attention_tokens is None else self.cross_attention_tokens

    def sequence_cost(self, num_tokens: int) -> float:
        return (
            super().sequence_cost(num_tokens) + num_tokens * (self.cross_attention_tokens or 0) / self.attention_tokens
        )

    def adapter_cost(self, num_weights: int) -> float:
        # By `attention_tokens`, a block's linear layers cost 4 width attention_tokens operations, two for each weight.
        width = self.num_heads * self.head_dim
        return num_weights / self.num_streams / (2 * width * self.attention_tokens * self.num_blocks)

    def decode_bytes(
        self, height: int, width: int, num_frames: int = 1, tile: bool = False, dtype_bytes: int = 2
    ) -> int:
        """Bytes that the decode of one picture or video needs at its peak, above the weights; 0: not known.

        An encode of an input picture or a conditioning video of these sizes needs less. height, width: in pixels; tile:
        whether the VAE's tiling is on; dtype_bytes: bytes of a number of the model's dtype, which Wan's VAE does not
        follow.
        """
        return 0 if self.vae is None else self.vae.decode_bytes(height, width, num_frames, tile, dtype_bytes)

    def check_settings(self, config: OmniDiffusionConfig) -> None:
        for name in ("enable_cpu_offload", "enable_layerwise_offload"):
            if getattr(config, name):
                raise NotAvailableError(
                    f"{flag_of(name)}: not available yet with a packed family, such as this model's"
                )
        served_files(config.lora_modules)
        if config.cache is not None:
            config.cache.check_model(self)

    def check_parallel(self, parallel: DiffusionParallelConfig) -> None:
        heads, tensor, ulysses = self.num_heads, parallel.tensor_parallel_size, parallel.ulysses_degree
        self.tensor_shares.check("--tensor-parallel-size", "this model's transformer", tensor)
        self.text_encoder_shares.check(
            "--text-encoder-tp-size", "this model's text encoder", parallel.text_encoder_tp_size
        )
        if ulysses > heads // tensor:
            raise ConfigError(
                f"--usp takes 1 to {heads // tensor}, the model's {heads} heads over --tensor-parallel-size {tensor}, "
                f"got {ulysses}"
            )
