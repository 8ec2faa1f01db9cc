"""Tensors of a safetensors file that any client may name: the header is checked first, then each tensor is read.

Reads release the GIL, so that steps go on meanwhile. Nothing of the weights is mapped: a file that is cut while its map
is read ends the process (SIGBUS).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

MAX_FILE_BYTES = 4 * 2**30
"""Largest file of an adapter."""
MAX_HEADER_BYTES = 4 * 2**20
"""Largest header. The library parses it with the GIL held; those of usual adapters have less than 1 MiB."""
MAX_DIMS = 8
"""Most dimensions of a weight; a weight of a 3D convolution has 5."""
STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""Name of a type in the header -> dtype."""


@dataclass(frozen=True)
class TensorHeader:
    """Header of a file; its `outlines` have the order of the tensors in the file, which leave no gaps."""

    metadata: Mapping[str, str]
    outlines: Mapping[str, Tensor]
    """Tensors on the device "meta", by key: dtypes and shapes without values."""
    data_start: int
    """Offset of the first tensor in the file, in bytes."""


def read_tensor_header(file: Path) -> TensorHeader:
    """Read and check the header of `file`; no tensor is read.

    Raises OSError, SafetensorError or ValueError for a file that is too large or broken, and for types and shapes that
    no adapter has.
    """
    if (num_bytes := file.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(f"an adapter has at most {MAX_FILE_BYTES} bytes, got {num_bytes}")
    with file.open("rb") as stream:
        start = stream.read(8)
    length = int.from_bytes(start, "little")
    if len(start) == 8 and length > MAX_HEADER_BYTES:
        raise ValueError(f"the header of an adapter has at most {MAX_HEADER_BYTES} bytes, got {length}")
    # The library checks that the tensors fill the file without gaps or overlaps, and that bytes, dtypes and shapes fit.
    with safe_open(file, framework="np") as opened:
        outlines = {}
        for key in opened.offset_keys():
            part = opened.get_slice(key)
            outlines[key] = _outline(key, part.get_dtype(), part.get_shape())
        return TensorHeader(opened.metadata() or {}, outlines, 8 + length)


def _outline(key: str, type_name: str, shape: list[int]) -> Tensor:
    if (dtype := STORED_DTYPES.get(type_name)) is None:
        raise ValueError(f"{key} takes the types {', '.join(STORED_DTYPES)}, got {type_name}")
    # The header of an empty tensor may have any sizes beside its 0.
    if len(shape) > MAX_DIMS or math.prod(max(size, 1) for size in shape) > MAX_FILE_BYTES:
        raise ValueError(
            f"{key} takes at most {MAX_DIMS} dimensions and {MAX_FILE_BYTES} values, "
            f"got {len(shape)} dimensions, first {shape[:MAX_DIMS]}"
        )
    return torch.empty(shape, dtype=dtype, device="meta")


def read_tensors(file: Path, header: TensorHeader) -> dict[str, Tensor]:
    """Tensors of `file` by key, on the CPU, in the order of `header`.

    Raises OSError, and ValueError for a file that was cut after its header was read.
    """
    with file.open("rb") as stream:
        stream.seek(header.data_start)
        return {key: _read_tensor(stream, key, outline) for key, outline in header.outlines.items()}


def _read_tensor(stream: BufferedReader, key: str, outline: Tensor) -> Tensor:
    values = torch.empty(outline.nbytes, dtype=torch.uint8)
    if (num_read := stream.readinto(values.numpy().data)) != outline.nbytes:
        raise ValueError(f"{key} has {outline.nbytes} bytes, the file ends after {num_read}: it was cut meanwhile")
    return values.view(outline.dtype).reshape(outline.shape)
