"""Compiled blocks of several kinds, as a file has them that stores some layers in float8."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.layers.fp8 import in_float8
from vllm_omni.diffusion.compute.layers.linear import ColumnLinear
from vllm_omni.diffusion.compute.layers.rounding import quantize
from vllm_omni.diffusion.compute.step.compiled import CompiledBlocks


class Block(nn.Module):
    def __init__(self, in_float: bool) -> None:
        super().__init__()
        self.layer: nn.Module = ColumnLinear(8, 8, Group.alone())
        if in_float:
            values, scale = quantize(self.layer.weight.detach())
            self.layer = in_float8(self.layer)
            self.layer.weight.data, self.layer.scale = values, scale

    def before(self, rows: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) * rows[0, :, 0]
        return y


@torch.inference_mode()
def test_each_kind_of_block_has_code_of_its_own() -> None:
    torch.manual_seed(0)
    blocks = [Block(in_float) for in_float in (False, True, False, True, True)]
    rows, x = torch.randn(1, 1, 1, 8), torch.randn(6, 8)
    eager = [block.before(rows, x) for block in blocks]
    compiled = CompiledBlocks(blocks, ["before"], "eager")
    for block, wanted in zip(blocks, eager, strict=True):
        torch.testing.assert_close(block.before(rows, x), wanted)
    assert [part.num_compilations for part in compiled.parts] == [1, 1]
    blocks[1].before(rows, torch.randn(9, 8))
    assert compiled.num_compilations == 2
