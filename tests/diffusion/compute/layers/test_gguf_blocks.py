"""Expanded blocks against those of the gguf package, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from testbed.gguf_files import HALVES, random_blocks
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
    quant = gguf.GGMLQuantizationType[name]
    if name in HALVES:
        stored = random_blocks(name, rows * columns // KINDS[name].block_numbers).reshape(rows, -1)
    else:
        stored = gguf.quantize(np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32), quant)
    want = torch.from_numpy(gguf.dequantize(stored, quant).astype(np.float32))
    out = torch.empty(rows, columns, dtype=dtype)
    expand_blocks(KINDS[name], torch.from_numpy(stored.view(np.uint8)), out)
    assert want.std() > 0.1
    assert torch.equal(out, want.to(dtype))
