"""Loading of a transformer from a GGUF file: layers that ranks share keep its blocks, all others are expanded."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vllm_omni.diffusion.catalog.gguf_header import GgufTensor, read_gguf_header
from vllm_omni.diffusion.compute.layers.compressed import CompressedColumnLinear, GgufRows, compress
from vllm_omni.diffusion.compute.layers.gguf_blocks import FLOATS, expand_blocks
from vllm_omni.diffusion.compute.layers.linear import ColumnLinear, RowLinear
from vllm_omni.diffusion.compute.weights.loading import (
    Allocate,
    OnBytes,
    allocate_memory,
    checkpoint_modules,
    set_dtype,
    weight_targets,
)
from vllm_omni.diffusion.compute.weights.stored_parts import StoredPart
from vllm_omni.errors import ConfigError

logger = logging.getLogger(__name__)


def with_dims_of_one(part: StoredPart, expected: tuple[int, ...]) -> StoredPart:
    """The part in the `expected` shape where only dims of length 1 differ, which llama.cpp's programs drop."""
    without = tuple(tuple(n for n in shape if n != 1) for shape in (part.shape, expected))
    return replace(part, shape=expected) if without[0] == without[1] else part


def load_gguf(
    module: nn.Module,
    file: Path,
    parts: Mapping[str, StoredPart],
    names: Mapping[str, tuple[str, ...]],
    device: torch.device,
    dtype: torch.dtype,
    on_bytes: OnBytes,
    allocate: Allocate | None = None,
) -> None:
    """Move `module`, built on the meta device, to `device` and fill it from `file`: see `load_weights`.

    parts: weights of the module by their names in the model folder. The file is mapped into memory, and each rank
    copies its share of the blocks as they are. Raises ConfigError, before memory is allocated, for blocks that the
    ranks of a tensor group cannot share.
    """
    tensors = read_gguf_header(file).tensors
    stored = {name: _Stored(tensors[part.key], part) for name, part in parts.items()}
    set_dtype(module, dtype)
    targets = _keep_blocks(module, stored, names)
    allocate_memory(module, device, allocate)
    module.requires_grad_(False).eval()
    if device.type == "meta":
        return
    data = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    whole = weight_targets(module, names)
    assert targets.keys() | whole.keys() == stored.keys(), "the transformer has other weights than its config says"
    for name, each in stored.items():
        if name in targets:
            on_bytes(targets[name].fill(each, data))
        else:
            whole[name].fill(_OpenTensor(each, data, device))
            kind = each.tensor.type
            on_bytes(whole[name].tensor.numel() // kind.block_numbers * kind.block_bytes)
    kept = sum(target.rows.blocks.nbytes for target in targets.values())
    logger.info(
        "%s (%s): %d weights stay compressed, %.2f GB; %d are expanded",
        file.name,
        ", ".join(sorted({each.tensor.type.name for each in stored.values()})),
        len(targets),
        kept / 1e9,
        len(stored) - len(targets),
    )


@dataclass(frozen=True)
class _Stored:
    """Rows of a tensor in the file."""

    tensor: GgufTensor
    part: StoredPart

    def blocks(self, data: Tensor) -> Tensor:
        """Blocks of the part, one after another: uint8 [blocks, bytes of a block]. data: uint8, the file's bytes."""
        kind, shape = self.tensor.type, self.part.shape
        start = self.tensor.first + _num_bytes(self.tensor, self.part.first_row * math.prod(shape[1:]))
        return data[start : start + _num_bytes(self.tensor, math.prod(shape))].view(-1, kind.block_bytes)


def _num_bytes(tensor: GgufTensor, numbers: int) -> int:
    return numbers // tensor.type.block_numbers * tensor.type.block_bytes


@dataclass(frozen=True)
class _OpenTensor:
    """A weight in a mapped file; an index gives that piece of it, expanded."""

    stored: _Stored
    data: Tensor
    device: torch.device

    def __getitem__(self, cuts: tuple[slice, ...]) -> Tensor:
        kind, shape, blocks = self.stored.tensor.type, self.stored.part.shape, self.stored.blocks(self.data)
        if kind.name in FLOATS:
            return blocks.view(FLOATS[kind.name]).view(shape)[cuts].to(self.device)
        numbers = torch.empty(len(blocks), kind.block_numbers, dtype=torch.float32, device=self.device)
        expand_blocks(kind, blocks.to(self.device), numbers)
        return numbers.view(shape)[cuts]


@dataclass(frozen=True)
class _BlocksTarget:
    """Destination of a weight that stays in blocks, and this rank's share of it."""

    rows: GgufRows
    layer: CompressedColumnLinear

    def fill(self, stored: _Stored, data: Tensor) -> int:
        """Copy this rank's share. Returns its bytes."""
        blocks = stored.blocks(data).view(stored.part.shape[0], -1)
        cut_dim = self.layer.cut_dims["weight"]
        length = self.rows.blocks.shape[cut_dim]
        self.rows.blocks.copy_(blocks.narrow(cut_dim, self.layer.group.rank * length, length))
        return self.rows.blocks.nbytes


def _keep_blocks(
    module: nn.Module, stored: Mapping[str, _Stored], names: Mapping[str, tuple[str, ...]]
) -> dict[str, _BlocksTarget]:
    """Replace the layers that ranks share, and of whose weights one is compressed, by layers that keep the blocks.

    module: on the meta device. Returns the target of each of their weights, by its name in `stored`.
    """
    targets: dict[str, _BlocksTarget] = {}
    for path, linear in list(module.named_modules()):
        if not isinstance(linear, (ColumnLinear, RowLinear)):
            continue
        weights = {f"{name}.weight": stored[f"{name}.weight"] for name in checkpoint_modules(path, names)}
        if not any(each.tensor.type.is_compressed for each in weights.values()):
            continue
        num_rows, num_columns = linear.out_features // len(weights), linear.in_features
        for name, each in weights.items():
            _check_share(name, each.tensor, linear)
        with torch.device("meta"):
            parts = [GgufRows(each.tensor.type, num_rows, num_columns) for each in weights.values()]
            layer = compress(linear, parts)
        module.set_submodule(path, layer)
        targets |= {name: _BlocksTarget(rows, layer) for name, rows in zip(weights, parts, strict=True)}
    return targets


def _check_share(name: str, tensor: GgufTensor, linear: ColumnLinear | RowLinear) -> None:
    """Raise ConfigError where this rank's share of a row is no whole number of blocks."""
    kind, size = tensor.type, linear.group.size
    if linear.in_features % kind.block_numbers:
        whole = linear.in_features * size
        most = max(ranks for ranks in range(1, size) if whole % ranks == 0 and whole // ranks % kind.block_numbers == 0)
        raise ConfigError(
            f"--tensor-parallel-size takes at most {most} with this GGUF file, got {size}: {name} is stored in "
            f"{kind.name}, in blocks of {kind.block_numbers} numbers, and {size} ranks would have {linear.in_features} "
            f"of its {whole} inputs each"
        )
