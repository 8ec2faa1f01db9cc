"""Expanded blocks against those of the gguf package, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from testbed.gguf_files import HALVES, expand_by_package, random_blocks
from vllm_omni.diffusion.catalog.gguf_header import OTHER_TYPES, TYPES
from vllm_omni.diffusion.compute.layers import gguf_blocks
from vllm_omni.diffusion.compute.layers.gguf_blocks import DECODERS, FLOATS, expand_blocks

KINDS = {kind.name: kind for kind in TYPES.values()}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def test_types_are_those_of_the_package() -> None:
    for number, kind in TYPES.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert (theirs.name, gguf.GGML_QUANT_SIZES[theirs]) == (kind.name, (kind.block_numbers, kind.block_bytes))
    others = {each.value: each.name for each in gguf.GGMLQuantizationType if each.value not in TYPES}
    assert OTHER_TYPES.items() <= others.items()
    assert KINDS.keys() == DECODERS.keys() | FLOATS.keys()
    assert HALVES.keys() == DECODERS.keys()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINDS)
def test_blocks_are_expanded_exactly(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_blocks, "CHUNK_NUMBERS", 1300)  # some rows at a time
    rows, columns = 7, 512
    if name in HALVES:
        blocks = random_blocks(name, rows * columns // KINDS[name].block_numbers)
    else:
        numbers = np.random.default_rng(0).normal(size=rows * columns).astype(np.float32)
        blocks = gguf.quantize(numbers, gguf.GGMLQuantizationType[name]).view(np.uint8)
        blocks = blocks.reshape(-1, KINDS[name].block_bytes)
    want = expand_by_package(name, blocks).view(rows, columns)
    out = torch.empty(rows, columns, dtype=dtype)
    expand_blocks(KINDS[name], torch.from_numpy(blocks).view(rows, -1), out)
    assert want.std() > 0.1
    assert torch.equal(out, want.to(dtype))
