"""FLOPs, bytes and exchanges of one rank in one denoising step, from a transformer's config.

The products and the attention that the packed transformers run in every step are counted exactly (tests compare with
PyTorch's counter). Not counted is work done once per request: modulation, the text's embedding and, in Z-Image, the
caption's layers, in Wan the keys and values of the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, Protocol

from vllm_omni.diffusion.compute.families.qwen_image.config import QwenImageConfig
from vllm_omni.diffusion.compute.families.wan.config import PATCH_PIXELS, WanConfig
from vllm_omni.diffusion.compute.families.wan.info import MAX_PROMPT_TOKENS
from vllm_omni.diffusion.compute.families.z_image.config import ZImageConfig
from vllm_omni.diffusion.compute.families.z_image.info import TOKEN_MULTIPLE
from vllm_omni.diffusion.compute.packing import shard_lengths
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.placement import balance

ELEMENT_BYTES = 2
"""Bytes of an element of activations, and of weights that are not float8."""
ONE_DEVICE = DiffusionParallelConfig()


class Branch(NamedTuple):
    """Tokens of one guidance branch."""

    text: int
    image: int


@dataclass(frozen=True)
class Gemm:
    """[rows, inner] x [inner, columns], `count` times."""

    name: str
    rows: int
    columns: int
    inner: int
    count: float = 1

    @property
    def flops(self) -> float:
        return 2 * self.rows * self.columns * self.inner * self.count

    def num_bytes(self, element: float = ELEMENT_BYTES) -> float:
        """Weight and input read once, in `element` bytes each, and output written once."""
        read = self.columns * self.inner + self.rows * self.inner
        return self.count * (element * read + ELEMENT_BYTES * self.rows * self.columns)


@dataclass(frozen=True)
class Attention:
    """Queries of one sequence over its keys, `count` times."""

    queries: int
    keys: int
    heads: int
    head_dim: int
    count: float = 1

    @property
    def flops(self) -> float:
        return 4 * self.queries * self.keys * self.heads * self.head_dim * self.count

    @property
    def num_bytes(self) -> float:
        """Queries, keys and values read once, output written once."""
        return ELEMENT_BYTES * 2 * (self.queries + self.keys) * self.heads * self.head_dim * self.count


@dataclass(frozen=True)
class StepCost:
    """Work of one rank in one denoising step."""

    gemms: tuple[Gemm, ...]
    attentions: tuple[Attention, ...]
    pointwise_bytes: float
    """Estimated bytes of norms with modulation, RoPE, activations, gated sums and the joining of text and image: each
    reads its inputs and writes its output once, as one kernel would."""
    exchanges: Mapping[str, float] = field(default_factory=dict)
    """Bytes handed to each kind of exchange, as `StepResult.sent_bytes` counts them, without those of step caches."""

    @property
    def gemm_flops(self) -> float:
        return sum(gemm.flops for gemm in self.gemms)

    @property
    def attention_flops(self) -> float:
        return sum(attention.flops for attention in self.attentions)

    @property
    def flops(self) -> float:
        return self.gemm_flops + self.attention_flops


class Transformer(Protocol):
    """Architecture of a transformer with its sizes."""

    @property
    def dim(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def channels(self) -> int:
        """Channels of one token of the predicted velocity."""

    @property
    def num_image_layers(self) -> int:
        """Layers before the blocks in which image tokens attend to each other alone."""

    @property
    def token_multiple(self) -> int: ...
    @property
    def pixels_per_token(self) -> int: ...
    @property
    def frame_multiple(self) -> int:
        """Frames of a video that a latent frame after the first stands for."""

    @property
    def cross_attention_tokens(self) -> int:
        """Text tokens that the blocks attend to beside the sequence, which then has none itself; 0: they are in it."""

    @property
    def summed_elements(self) -> int:
        """Elements of each token that the ranks of a tensor group add up in a layer."""

    def gemms(self, text: int, image: int, tensor: int, blocks: float) -> list[Gemm]:
        """Matrix products of one rank, if `tensor` ranks share every layer.

        `text`, `image`: numbers of tokens; `blocks`: number of blocks that are computed.
        """

    def pointwise_elements(self, text: int, image: int, tensor: int, blocks: float) -> float:
        """Elements that the operations between the products read and write."""


class _EqualBlocks:
    """Sizes of a transformer whose blocks are all alike, as its config names them."""

    config: QwenImageConfig | WanConfig

    @property
    def num_blocks(self) -> int:
        return self.config.num_layers

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.config.attention_head_dim


@dataclass(frozen=True)
class QwenImage(_EqualBlocks):
    config: QwenImageConfig = field(default_factory=QwenImageConfig)
    token_multiple: int = 1
    num_image_layers: int = 0
    pixels_per_token: int = 16
    frame_multiple: int = 1
    cross_attention_tokens: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QwenImage:
        return cls(QwenImageConfig.from_dict(config))

    @property
    def channels(self) -> int:
        return self.config.in_channels

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def summed_elements(self) -> int:
        return 2 * self.dim

    def gemms(self, text: int, image: int, tensor: int, blocks: float) -> list[Gemm]:
        dim = self.dim
        streams = (("image", image), ("text", text))
        return [
            Gemm("img_in", image, dim, self.channels),
            *(Gemm(f"{name}.qkv", rows, 3 * dim // tensor, dim, blocks) for name, rows in streams),
            *(Gemm(f"{name}.out", rows, dim, dim // tensor, blocks) for name, rows in streams),
            *(Gemm(f"{name}.up", rows, 4 * dim // tensor, dim, blocks) for name, rows in streams),
            *(Gemm(f"{name}.down", rows, dim, 4 * dim // tensor, blocks) for name, rows in streams),
            Gemm("proj_out", image, self.channels, dim),
        ]

    def pointwise_elements(self, text: int, image: int, tensor: int, blocks: float) -> float:
        # Norms 2 x 2, gated sums 2 x 3; of a rank's own channels: join 6, norm and RoPE of q and k 4, split 2, GELU 8.
        return (text + image) * self.dim * blocks * (10 + 20 / tensor)


@dataclass(frozen=True)
class ZImage:
    config: ZImageConfig = field(default_factory=ZImageConfig)
    token_multiple: int = TOKEN_MULTIPLE
    pixels_per_token: int = 16
    frame_multiple: int = 1
    cross_attention_tokens: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ZImage:
        return cls(ZImageConfig.from_dict(config))

    @property
    def num_blocks(self) -> int:
        return self.config.n_layers

    @property
    def num_image_layers(self) -> int:
        return self.config.n_refiner_layers

    @property
    def heads(self) -> int:
        return self.config.n_heads

    @property
    def head_dim(self) -> int:
        return self.config.head_dim

    @property
    def channels(self) -> int:
        return self.config.channels_per_token

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def summed_elements(self) -> int:
        return 2 * self.dim

    def gemms(self, text: int, image: int, tensor: int, blocks: float) -> list[Gemm]:
        dim, inner = self.dim, self.config.inner_width
        layers = (("refiner", image, self.num_image_layers), ("layers", text + image, blocks))
        return [
            Gemm("image_embedder", image, dim, self.channels),
            *(Gemm(f"{name}.qkv", rows, 3 * dim // tensor, dim, count) for name, rows, count in layers),
            *(Gemm(f"{name}.out", rows, dim, dim // tensor, count) for name, rows, count in layers),
            *(Gemm(f"{name}.gate_up", rows, 2 * inner // tensor, dim, count) for name, rows, count in layers),
            *(Gemm(f"{name}.down", rows, dim, inner // tensor, count) for name, rows, count in layers),
            Gemm("output", image, self.channels, dim),
        ]

    def pointwise_elements(self, text: int, image: int, tensor: int, blocks: float) -> float:
        # Norms 4 x 2, gated sums 2 x 3; of a rank's own channels: norm and RoPE of q and k 4, the gated unit 3 x inner.
        a_token = self.dim * 14 + (4 * self.dim + 3 * self.config.inner_width) / tensor
        return a_token * (image * self.num_image_layers + (text + image) * blocks)


@dataclass(frozen=True)
class Wan(_EqualBlocks):
    """Blocks hold image tokens alone, and attend to the text's keys, which are made once a request."""

    config: WanConfig = field(default_factory=WanConfig)
    token_multiple: int = 1
    num_image_layers: int = 0
    pixels_per_token: int = 16
    frame_multiple: int = 4
    cross_attention_tokens: int = MAX_PROMPT_TOKENS

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Wan:
        """Raises ValueError for a transformer that also attends to input pictures."""
        read = WanConfig.from_dict(config)
        if read.sees_image:
            raise ValueError(f"expected a Wan transformer without image_dim, got image_dim {read.image_dim}")
        return cls(read)

    @property
    def channels(self) -> int:
        return PATCH_PIXELS * self.config.num_output_channels

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def summed_elements(self) -> int:
        # Three row-parallel layers; mean squares of q, k and the text's queries, in float32.
        return 3 * self.dim + 3 * 4 // ELEMENT_BYTES

    def gemms(self, text: int, image: int, tensor: int, blocks: float) -> list[Gemm]:
        dim, inner = self.dim, self.config.ffn_dim
        return [
            Gemm("patch_embedding", image, dim, PATCH_PIXELS * self.config.in_channels),
            Gemm("video.qkv", image, 3 * dim // tensor, dim, blocks),
            Gemm("video.out", image, dim, dim // tensor, blocks),
            Gemm("video.cross_q", image, dim // tensor, dim, blocks),
            Gemm("video.cross_out", image, dim, dim // tensor, blocks),
            Gemm("video.up", image, inner // tensor, dim, blocks),
            Gemm("video.down", image, dim, inner // tensor, blocks),
            Gemm("proj_out", image, self.channels, dim),
        ]

    def pointwise_elements(self, text: int, image: int, tensor: int, blocks: float) -> float:
        # Norms 3 x 2, gated sums 2 x 3, a sum 3; of a rank's own channels: norm and RoPE of q and k 4, norm of the
        # text's queries 2, activation 2 x inner.
        return image * blocks * (15 * self.dim + (6 * self.dim + 2 * self.config.ffn_dim) / tensor)


def transformer_of(config: Mapping[str, Any]) -> Transformer:
    """Transformer of a transformer/config.json. Raises ValueError for one whose costs are not known."""
    families = {
        "QwenImageTransformer2DModel": QwenImage,
        "ZImageTransformer2DModel": ZImage,
        "WanTransformer3DModel": Wan,
    }
    name = config.get("_class_name")
    if name not in families:
        raise ValueError(f"expected one of {', '.join(families)}, got {name!r}")
    return families[name].from_config(config)  # type: ignore[attr-defined, no-any-return]  # both have it


def sequences_of(
    model: Transformer, height: int, width: int, text: Sequence[int], batch: int = 1, frames: int = 1
) -> list[list[Branch]]:
    """Branches of each request. `height`, `width`: in pixels; `text`: tokens of each branch; `frames`: of a video."""
    side = model.pixels_per_token
    image = (1 + (frames - 1) // model.frame_multiple) * (height // side) * (width // side)
    return [[branch_of(model, tokens, image) for tokens in text]] * batch


def branch_of(model: Transformer, text: int, image: int) -> Branch:
    """Branch of a prompt of `text` tokens, which are in the sequence unless the blocks attend to them beside it."""
    return Branch(0 if model.cross_attention_tokens else text, image)


def computed_blocks(model: Transformer, cached: float, kept: int = 1) -> float:
    """Mean blocks in a step, if a step cache computes only `kept` blocks in the fraction `cached` of the steps."""
    return model.num_blocks - cached * (model.num_blocks - kept)


def rank_cost(
    model: Transformer,
    requests: Sequence[Sequence[Branch]],
    parallel: DiffusionParallelConfig = ONE_DEVICE,
    rank: int = 0,
    blocks: float | None = None,
) -> StepCost:
    """Cost of a step on rank 0 of a replica, which has the most work. `requests`: the branches of each.

    `blocks`: number of computed blocks, see `computed_blocks`; None: all. Sequences are placed on rank groups as the
    scheduler places them.
    """
    blocks = model.num_blocks if blocks is None else blocks
    ulysses, ring, tensor = parallel.ulysses_degree, parallel.ring_degree, parallel.tensor_parallel_size
    parts = ulysses * ring
    group, part = divmod(rank // tensor, parts)
    by_group = _deal(model, requests, parallel.cfg_parallel_size)
    mine = by_group[group]
    text, image = (
        sum(shard_lengths(n, parts)[part] for n in column)
        for column in ([s.text for s in mine], [s.image for s in mine])
    )
    heads = shard_lengths(model.heads // tensor, ulysses)[part % ulysses]

    attentions = []
    exchanged: dict[str, float] = {}
    for count, sequences in (
        (model.num_image_layers, [Branch(0, s.image) for s in mine]),
        (blocks, mine),
    ):
        shards = [_shard(sequences, parts, r * ulysses, ulysses) for r in range(ring)]
        held = shards[part // ulysses]
        attentions += [
            Attention(queries, s.text + s.image, heads, model.head_dim, count) for queries, s in zip(held, sequences)
        ]
        own = sum(shard_lengths(s.text, parts)[part] + shard_lengths(s.image, parts)[part] for s in sequences)
        for kind, elements in _sequence_exchanges(
            model, parallel, own, [sum(s) for s in shards], heads, part // ulysses
        ):
            exchanged[kind] = exchanged.get(kind, 0.0) + ELEMENT_BYTES * count * elements
    if model.cross_attention_tokens:  # each rank has all keys of its heads: nothing is exchanged
        attentions += [
            Attention(queries, model.cross_attention_tokens, model.heads // tensor, model.head_dim, blocks)
            for queries in (shard_lengths(s.image, parts)[part] for s in mine)
        ]
    if tensor > 1:
        summed = model.summed_elements * ((text + image) * blocks + image * model.num_image_layers)
        exchanged["all_reduce"] = ELEMENT_BYTES * summed
    if parts * parallel.cfg_parallel_size > 1:
        rows = max(sum(shard_lengths(s.image, parts)[0] for s in sequences) for sequences in by_group)
        exchanged["all_gather"] = ELEMENT_BYTES * rows * model.channels
    return StepCost(
        gemms=tuple(model.gemms(text, image, tensor, blocks)),
        attentions=tuple(a for a in attentions if a.count),
        pointwise_bytes=ELEMENT_BYTES * model.pointwise_elements(text, image, tensor, blocks),
        exchanges={kind: count for kind, count in exchanged.items() if count},
    )


def _deal(model: Transformer, requests: Sequence[Sequence[Branch]], num_groups: int) -> list[list[Branch]]:
    """Sequences of each rank group, padded as the model pads them."""
    multiple = model.token_multiple
    filled = [[Branch(*(-(-n // multiple) * multiple for n in s)) for s in branches] for branches in requests]
    tokens = {str(i): [sum(s) for s in branches] for i, branches in enumerate(filled)}
    groups = chain.from_iterable(balance(tokens, num_groups).values())
    dealt: list[list[Branch]] = [[] for _ in range(num_groups)]
    for group, sequence in zip(groups, chain.from_iterable(filled)):
        dealt[group].append(sequence)
    return dealt


def _shard(sequences: Sequence[Branch], parts: int, first: int, count: int) -> list[int]:
    """Tokens of each sequence in `count` shards from shard `first` on."""
    return [sum(sum(shard_lengths(n, parts)[first : first + count]) for n in sequence) for sequence in sequences]


def _sequence_exchanges(
    model: Transformer, parallel: DiffusionParallelConfig, own: int, shards: Sequence[int], heads: int, ring_rank: int
) -> list[tuple[str, int]]:
    """Elements that a rank sends in a layer's attention. `own`: its tokens; `shards`: tokens by rank of the ring."""
    found = []
    if parallel.ulysses_degree > 1:
        there = own * 3 * (model.heads // parallel.tensor_parallel_size) * model.head_dim
        found.append(("all_to_all", there + shards[ring_rank] * heads * model.head_dim))
    size = len(shards)
    if size > 1:
        passed_on = sum(shards[(ring_rank - step) % size] for step in range(size - 1))
        found.append(("p2p", 2 * passed_on * heads * model.head_dim))
    return found
