"""Time of expanding compressed weights, beside the products that they are expanded for.

    python -m benchmarks.compressed --width 3072 --tokens 8192

One layer as in the MLP of Qwen-Image's blocks, [4 width, width], with random weights, in bfloat16 on a GPU and float32
on a CPU. "In a step": expanding the layers of 60 blocks that run at every step, 13.6e9 numbers at a width of 3072.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.timing import measure
from vllm_omni.diffusion.catalog.gguf_header import TYPES
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.layers.compressed import CompressedRows, GgufRows, ScaledRows, compress
from vllm_omni.diffusion.compute.layers.linear import ColumnLinear
from vllm_omni.diffusion.compute.layers.rounding import FLOAT8

BLOCKS, LAYERS = 60, 24
"""Blocks, and sizes of their layers in width², modulation left out."""


KINDS = {kind.name: kind for kind in TYPES.values() if kind.is_compressed}
DTYPES = {"int8": torch.int8, "fp8": FLOAT8}


def random_rows(form: str, out: int, inner: int) -> CompressedRows:
    """Random rows in a form in which a weight may be kept; scales in GGUF's blocks may be NaN."""
    if form in KINDS:
        rows = GgufRows(KINDS[form], out, inner)
        rows.blocks.random_(0, 256)
        return rows
    scaled = ScaledRows(DTYPES[form], out, inner)
    scaled.values, scaled.scales = scaled.rounding(torch.randn(out, inner))
    return scaled


def held_bytes(rows: CompressedRows) -> int:
    return sum(buffer.nbytes for buffer in rows.buffers())


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=3072, help="a multiple of 256")
    parser.add_argument("--tokens", type=int, default=8192, help="rows of the layer's input")
    parser.add_argument("--forms", nargs="+", choices=[*KINDS, *DTYPES], default=[*KINDS, *DTYPES])
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inner, out = args.width, 4 * args.width
    x = torch.randn(args.tokens, inner, device=device, dtype=dtype)
    with torch.device("meta"):
        plain = ColumnLinear(inner, out, Group.alone(), bias=False).to(dtype)

    def milliseconds(run: object) -> float:
        assert callable(run)
        return 1e3 * measure(run, device).median

    weight = torch.randn(out, inner, device=device, dtype=dtype)
    print(f"| {out} x {inner}, {args.tokens} tokens | bits a number | expand | product | both | expand in a step |")
    print("|---|---|---|---|---|---|")
    product = milliseconds(lambda: torch.nn.functional.linear(x, weight))
    for name in args.forms:
        rows = random_rows(name, out, inner)
        layer = compress(plain, [rows]).to(device)

        def expand(rows: CompressedRows = rows, target: Tensor = weight) -> None:
            rows.expand(target)

        alone, both = milliseconds(expand), milliseconds(lambda layer=layer: layer(x))
        bits = 8 * held_bytes(rows) / (out * inner)
        step = alone * BLOCKS * LAYERS * inner / out
        print(f"| {name} | {bits:.2f} | {alone:.3f} ms | {product:.3f} ms | {both:.3f} ms | {step:.0f} ms |")


if __name__ == "__main__":
    main()
