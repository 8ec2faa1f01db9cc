"""Linear layers whose weights stay compressed in memory and are expanded, layer by layer, when they are used.

Products are computed in the dtype of the inputs. Compressed bytes are buffers of the modules.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.diffusion.catalog.gguf_header import GgufType
from vllm_omni.diffusion.compute.layers.gguf_blocks import CHUNK_NUMBERS, expand_blocks
from vllm_omni.diffusion.compute.layers.linear import ColumnEmbedding, ColumnLinear, RowLinear
from vllm_omni.diffusion.compute.layers.low_rank import Adaptable
from vllm_omni.diffusion.compute.layers.rounding import FLOAT8, LEAST_SCALE, Rows, quantize

GROUP = 128
"""Most numbers of a row that share a scale: with fewer, int8 is more precise and scales take more memory."""
LEAST_GROUP = 16
"""Rows that are not a multiple of this have one scale each."""
MAX_INT8 = 127


class CompressedRows(nn.Module):
    """Rows of a weight in a compressed form."""

    num_rows: int
    num_columns: int

    @abstractmethod
    def expand(self, out: Tensor) -> None:
        """Write all rows to `out`: [rows, columns], of any floating-point dtype."""


class GgufRows(CompressedRows):
    """Rows in GGUF's blocks. blocks: uint8 [rows, bytes of a row]."""

    def __init__(self, kind: GgufType, num_rows: int, num_columns: int) -> None:
        """num_columns: a multiple of the numbers of a block. The blocks are loaded later."""
        super().__init__()
        assert num_columns % kind.block_numbers == 0, f"{num_columns} columns in blocks of {kind.block_numbers}"
        self.kind = kind
        self.num_rows, self.num_columns = num_rows, num_columns
        row_bytes = num_columns // kind.block_numbers * kind.block_bytes
        self.blocks: Tensor
        self.register_buffer("blocks", torch.empty(num_rows, row_bytes, dtype=torch.uint8))

    def expand(self, out: Tensor) -> None:
        expand_blocks(self.kind, self.blocks, out)


class ScaledRows(CompressedRows):
    """Rows in int8 or float8 with a scale for each group of numbers: `value * scale`.

    values: int8 or float8 [rows, columns]; scales: float32 [rows, groups].
    """

    def __init__(self, dtype: torch.dtype, num_rows: int, num_columns: int) -> None:
        """dtype: torch.int8 or FLOAT8. The values are loaded later."""
        super().__init__()
        self.num_rows, self.num_columns = num_rows, num_columns
        self.num_groups = num_columns // group_length(num_columns)
        self.values: Tensor
        self.scales: Tensor
        self.register_buffer("values", torch.empty(num_rows, num_columns, dtype=dtype))
        self.register_buffer("scales", torch.empty(num_rows, self.num_groups, dtype=torch.float32))

    @property
    def rounding(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Function from rows [n, columns] to their values and scales."""
        return round_to_int8 if self.values.dtype == torch.int8 else round_to_float8

    def expand(self, out: Tensor) -> None:
        rows_at_once = max(1, CHUNK_NUMBERS // max(1, self.num_columns))
        parts = (tensor.split(rows_at_once) for tensor in (self.values, self.scales, out))
        for values, scales, target in zip(*parts, strict=True):
            grouped = (len(values), self.num_groups, -1)
            torch.mul(_wide(values).view(grouped), scales[..., None], out=target.view(grouped))

    def select(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [..., columns] with these numbers, int64 [...]."""
        # An index takes no float8.
        values = self.values.view(torch.int8)[numbers].view(self.values.dtype)
        grouped: Tensor = _wide(values).unflatten(-1, (self.num_groups, -1)) * self.scales[numbers][..., None]
        return grouped.flatten(-2).to(dtype)


def _wide(values: Tensor) -> Tensor:
    """Values as factors of float32 numbers; PyTorch multiplies int8 with float32, but no float8."""
    return values if values.dtype == torch.int8 else values.float()


def group_length(num_columns: int) -> int:
    """Numbers of a row of `num_columns` that share a scale."""
    common = math.gcd(num_columns, GROUP)
    return common if common >= LEAST_GROUP else num_columns


def round_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round [rows, columns] to int8, with scales float32 [rows, groups]: a group's largest magnitude becomes 127."""
    grouped = _in_groups(x).float()
    scale = (grouped.abs().amax(dim=-1, keepdim=True) / MAX_INT8).clamp(min=LEAST_SCALE)
    return (grouped / scale).round_().to(torch.int8).view(x.shape), scale[..., 0]


def round_to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round [rows, columns] to float8, with scales float32 [rows, groups]: see `quantize`."""
    values, scale = quantize(_in_groups(x))
    return values.view(x.shape), scale[..., 0]


def _in_groups(x: Tensor) -> Tensor:
    grouped: Tensor = x.unflatten(-1, (-1, group_length(x.shape[-1])))
    return grouped


class CompressedColumnLinear(Adaptable):
    """`ColumnLinear` with a compressed weight. The parts of a fused layer may have different forms.

    weight: of the meta device, with the shape and dtype of the expanded weight and without values.
    """

    cut_dims: ClassVar[Mapping[str, int]] = ColumnLinear.cut_dims
    is_float8: ClassVar[bool] = False
    late_bias: Tensor | None = None

    def __init__(self, linear: ColumnLinear | RowLinear, parts: Sequence[CompressedRows]) -> None:
        """Layer with the sizes, bias and group of `linear`. parts: rows of the weight, one after another."""
        super().__init__()
        assert sum(part.num_rows for part in parts) == linear.out_features
        self.group = linear.group
        self.parts = nn.ModuleList(parts)
        self.bias = linear.bias
        self.weight = torch.empty_like(linear.weight, device="meta", requires_grad=False)

    def expanded(self, like: Tensor) -> Tensor:
        """The weight [out, in] in the dtype and on the device of `like`."""
        weight = like.new_empty(self.weight.shape)
        first = 0
        for part in self.parts:
            assert isinstance(part, CompressedRows)
            part.expand(weight[first : first + part.num_rows])
            first += part.num_rows
        return weight

    def product(self, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)
        return self._linear(x, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input)

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.expanded(x)
        return F.linear(x, weight, bias) if self.change is None else self.change.linear(x, weight, bias)


class CompressedRowLinear(CompressedColumnLinear):
    """`RowLinear` with a compressed weight."""

    cut_dims: ClassVar[Mapping[str, int]] = RowLinear.cut_dims

    @property
    def late_bias(self) -> Tensor | None:  # type: ignore[override]  # read-only here
        return None if self.group.size == 1 else self.bias

    def product(self, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)
        if self.group.size == 1:
            return self._linear(x, self.bias)
        return self.group.all_reduce(self._linear(x, None))

    def forward(self, input: Tensor) -> Tensor:
        y, bias = self.product(input), self.late_bias
        return y if bias is None else y.add_(bias)


class CompressedEmbedding(nn.Module):
    """`ColumnEmbedding` whose entries are scaled rows; only the entries that are looked up are expanded."""

    cut_dims: ClassVar[Mapping[str, int]] = ColumnEmbedding.cut_dims

    def __init__(self, embedding: ColumnEmbedding, rows: ScaledRows) -> None:
        """Embedding with the sizes and group of `embedding`."""
        super().__init__()
        self.group = embedding.group
        self.rows = rows
        self.weight = torch.empty_like(embedding.weight, device="meta", requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        mine = self.rows.select(input, self.weight.dtype)
        return self.group.all_gather(mine).movedim(0, -2).flatten(-2)


def compress(linear: ColumnLinear | RowLinear, parts: Sequence[CompressedRows]) -> CompressedColumnLinear:
    """Compressed layer in place of `linear`."""
    compressed = CompressedColumnLinear if isinstance(linear, ColumnLinear) else CompressedRowLinear
    return compressed(linear, parts)


def keep_in_scaled_rows(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace the layers of `module` that ranks share, and its embedding, by layers in scaled rows.

    module: on the meta device. dtype: torch.int8 or FLOAT8.
    """
    assert dtype in (torch.int8, FLOAT8)
    for path, layer in list(module.named_modules()):
        with torch.device("meta"):
            if isinstance(layer, (ColumnLinear, RowLinear)):
                module.set_submodule(path, compress(layer, [ScaledRows(dtype, *layer.weight.shape)]))
            elif isinstance(layer, ColumnEmbedding):
                module.set_submodule(path, CompressedEmbedding(layer, ScaledRows(dtype, *layer.weight.shape)))
