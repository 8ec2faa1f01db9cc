"""Measurements on several ranks: exchanges of a step's sizes, attention with them, shared decodes.

Times are seconds of the slowest rank. All ranks must call the same functions in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from benchmarks.gpu.bench import Size
from benchmarks.roofline.costs import Branch
from benchmarks.timing import measure
from vllm_omni.diffusion.compute.attention import BACKENDS, Setting, backend_class, create_attention
from vllm_omni.diffusion.compute.attention.sharded import ShardedAttention
from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup, Group
from vllm_omni.diffusion.compute.distributed.mesh import World
from vllm_omni.diffusion.compute.distributed.ring import Ring
from vllm_omni.diffusion.compute.families.qwen_image.vae import QwenImageDecoder, tiling_of
from vllm_omni.diffusion.compute.packing import Offsets, Pack, shard_lengths
from vllm_omni.diffusion.compute.vae import tiles
from vllm_omni.diffusion.compute.weights.loading import load_autoencoder
from vllm_omni.diffusion.data import AttentionBackendName

WARM_UPS = 3
BUDGET_SECONDS = 0.3
NUM_LATENT_CHANNELS = 16


@dataclass(frozen=True)
class Exchange:
    """One kind of exchange on one rank."""

    seconds: float
    wire_bytes: float
    """Bytes that leave or reach the rank, whichever is more."""


@dataclass(frozen=True)
class AttentionParts:
    """Attention of a layer over sequences that ranks share."""

    layer: float
    attention: float
    """Seconds of the same attention without exchanges."""
    exchanges: tuple[Exchange, ...]
    """Exchanges without attention: for Ulysses q, k, v and the output, for a ring all turns of keys and values."""


@dataclass(frozen=True)
class Decodes:
    """Seconds of a picture's decode."""

    whole: float
    tiled: float
    shared: float
    """Seconds with the tiles shared by all ranks."""
    largest_share: float
    """Largest fraction of the tiles' area that one rank decodes."""


def together(world: World, device: torch.device, run: Callable[[], object], warm_ups: int = WARM_UPS) -> float:
    """Median of repeats after a warm-up; all ranks repeat equally often."""
    agree = world.mesh.control.agree
    return agree(measure(run, device, warm_ups=warm_ups, budget=BUDGET_SECONDS, agree=agree).median)


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def one_way(world: World, device: torch.device, num_bytes: int) -> Exchange:
    """Exchange from the first rank to the second."""
    group = world.mesh.world
    block = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def run() -> None:
        if group.rank > 1:
            return
        act = dist.isend if group.rank == 0 else dist.irecv
        for work in dist.batch_isend_irecv([dist.P2POp(act, block, 1 - group.rank, group.process_group)]):
            work.wait()

    return Exchange(together(world, device, run), num_bytes)


def both_ways(world: World, device: torch.device, num_bytes: int) -> Exchange:
    """Exchange from every rank to the next one at the same time."""
    ring = Ring(world.mesh.world)
    block = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def run() -> None:
        ring.post(block, block.shape)
        ring.wait()

    return Exchange(together(world, device, run), num_bytes)


def all_reduce(world: World, device: torch.device, rows: int, width: int) -> Exchange:
    group = world.mesh.world
    x = torch.zeros(rows, width, dtype=dtype_on(device), device=device)
    seconds = together(world, device, lambda: group.all_reduce(x))
    return Exchange(seconds, 2 * (group.size - 1) / group.size * x.nbytes)


def ulysses(
    world: World, device: torch.device, branches: Sequence[Branch], heads: int, head_dim: int
) -> AttentionParts:
    group, pack, qkv = _shares(world, device, branches, heads, head_dim)
    backend = create_attention(fastest_attention(device, head_dim))
    layer = ShardedAttention(backend, group, Group.alone(), pack)
    parts, tokens = shard_lengths(heads, group.size), [sum(lengths) for lengths in pack.joint_lengths]
    mine, here, there = parts[group.rank], tokens[group.rank], sum(tokens)
    exchanges = []
    for factor in (3, 1):  # q, k and v; then the output
        width = factor * head_dim
        by_heads, by_tokens = [here * width * h for h in parts], [n * width * mine for n in tokens]
        send, receive = (by_heads, by_tokens) if factor == 3 else (by_tokens, by_heads)
        x = qkv.new_zeros(sum(send))
        seconds = together(world, device, lambda x=x, s=send, r=receive: group.all_to_all(x, s, r))  # type: ignore[misc]  # bound
        exchanges.append(Exchange(seconds, x.element_size() * (sum(send) - send[group.rank])))
    q, k, v = torch.randn(3, there, mine, head_dim, dtype=qkv.dtype, device=device)
    offsets = Offsets.of([b.text + b.image for b in branches], device)
    return AttentionParts(
        layer=together(world, device, lambda: layer(*qkv)),
        attention=together(world, device, lambda: backend.attend(q, k, v, offsets, offsets)),
        exchanges=tuple(exchanges),
    )


def ring(world: World, device: torch.device, branches: Sequence[Branch], heads: int, head_dim: int) -> AttentionParts:
    group, pack, qkv = _shares(world, device, branches, heads, head_dim)
    backend = create_attention(fastest_attention(device, head_dim))
    blocks = Ring(group)
    shapes = [(sum(lengths), 2, heads, head_dim) for lengths in pack.joint_lengths]
    kv = torch.stack(tuple(qkv), dim=1)[:, 1:]

    def turn() -> None:
        held = kv
        for step in range(1, group.size):
            blocks.post(held, shapes[(group.rank - step) % group.size])
            held = blocks.wait()

    moving, standing = (ShardedAttention(backend, Group.alone(), group, pack, make) for make in (Ring, StandingRing))
    held_on = [shapes[(group.rank - step) % group.size] for step in range(group.size - 1)]
    passed_on = kv.element_size() * sum(torch.Size(shape).numel() for shape in held_on)
    return AttentionParts(
        layer=together(world, device, lambda: moving(*qkv)),
        attention=together(world, device, lambda: standing(*qkv)),
        exchanges=(Exchange(together(world, device, turn), passed_on),),
    )


class StandingRing(Ring):
    """Ring without transfers; it returns tensors of the right shape."""

    def post(self, block: Tensor, incoming_shape: Sequence[int]) -> None:
        self._incoming = block.new_empty(tuple(incoming_shape))

    def wait(self) -> Tensor:
        return self._incoming


def _shares(
    world: World, device: torch.device, branches: Sequence[Branch], heads: int, head_dim: int
) -> tuple[Group, Pack, Tensor]:
    """Pack of this rank's tokens of the sequences, and q, k, v [3, tokens, heads, head_dim]."""
    group = world.mesh.world
    pack = Pack.build([b.text for b in branches], [b.image for b in branches], device, group.size, group.rank)
    qkv = torch.randn(3, pack.num_tokens, heads, head_dim, dtype=dtype_on(device), device=device)
    return group, pack, qkv


def fastest_attention(device: torch.device, head_dim: int) -> AttentionBackendName:
    """Fastest backend of this device, the same on all ranks; on a GPU cuDNN's if it runs, as workers choose."""
    if device.type == "cpu":
        return "sdpa"
    setting = Setting(device, torch.cuda.get_device_capability(device), dtype_on(device), head_dim)
    preferred: tuple[AttentionBackendName, ...] = ("cudnn", *BACKENDS)
    return next(name for name in preferred if backend_class(name).why_not(setting) is None)


def decodes(world: World, device: torch.device, folder: str, size: Size) -> Decodes:
    """Decode times of a Qwen-Image picture: one rank alone, whole and in the VAE's tiles, and all ranks together."""
    vae = load_autoencoder(
        AutoencoderKLQwenImage, Path(folder) / "vae", device, dtype_on(device), lambda count: None, "dummy"
    )
    grid = 1, size[0] // 16, size[1] // 16
    tokens = torch.randn(math.prod(grid), 4 * NUM_LATENT_CHANNELS, dtype=dtype_on(device), device=device)
    whole, tiled, shared = (
        together(world, device, lambda d=decoder: d([tokens], [grid]), warm_ups=1)  # type: ignore[misc]  # bound
        for decoder in (
            QwenImageDecoder(vae, False, in_tiles, group)  # made one after another: tiling is the VAE's own setting
            for in_tiles, group in ((False, DecodeGroup.alone()), (True, DecodeGroup.alone()), (True, world.mesh.vae))
        )
    )
    scale, tiling = tiling_of(vae)
    shares = tiles.assign_tiles(tiles.split_into_tiles(0, size[0] // scale, size[1] // scale, tiling), world.size)
    areas = [sum(tile.height * tile.width for tile in share) for share in shares]
    return Decodes(whole, tiled, shared, largest_share=max(areas) / sum(areas))
