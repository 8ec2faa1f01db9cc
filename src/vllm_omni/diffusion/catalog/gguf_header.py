"""Headers of GGUF files: names, types, shapes and places of the tensors. No torch here, and no tensor is read.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vllm_omni.diffusion.catalog.folder_files import open_path
from vllm_omni.errors import ConfigError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 8
MAX_TENSORS = 2**20
ALIGNMENT = "general.alignment"
ARCHITECTURE = "general.architecture"
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Start of the keys by which converters store the shapes of tensors that they have reshaped."""
KEPT = (ALIGNMENT, ARCHITECTURE, ORIGINAL_SHAPE)
"""Starts of the keys whose values are kept."""
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Number of a type of metadata -> its format in the module `struct`."""


class GgufType(NamedTuple):
    """Form in which numbers are stored: in blocks of bytes, one after another along the last dim."""

    name: str
    block_numbers: int
    """Numbers in a block."""
    block_bytes: int

    @property
    def is_compressed(self) -> bool:
        """Whether numbers are stored with scales, and not as floats of their own."""
        return self.block_numbers > 1


TYPES = {
    0: GgufType("F32", 1, 4),
    1: GgufType("F16", 1, 2),
    2: GgufType("Q4_0", 32, 18),
    3: GgufType("Q4_1", 32, 20),
    6: GgufType("Q5_0", 32, 22),
    7: GgufType("Q5_1", 32, 24),
    8: GgufType("Q8_0", 32, 34),
    10: GgufType("Q2_K", 256, 84),
    11: GgufType("Q3_K", 256, 110),
    12: GgufType("Q4_K", 256, 144),
    13: GgufType("Q5_K", 256, 176),
    14: GgufType("Q6_K", 256, 210),
    30: GgufType("BF16", 1, 2),
}
"""Number in a file -> type that is read."""
OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
"""Number in a file -> name of a type that is not read."""


class GgufTensor(NamedTuple):
    """Description of a tensor in the header of a file."""

    type: GgufType
    shape: tuple[int, ...]
    """As in PyTorch: the dim whose numbers lie side by side is the last one."""
    first: int
    """Number of its first byte in the file."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) // self.type.block_numbers * self.type.block_bytes


@dataclass(frozen=True)
class GgufHeader:
    """Tensors of a file by name, and its architecture, such as `qwen_image`; empty if the file does not say it."""

    tensors: Mapping[str, GgufTensor]
    architecture: str = ""


def read_gguf_header(path: Path) -> GgufHeader:
    """Header of the GGUF file `path`, which has all bytes that the header promises.

    Raises ConfigError, with the file and the reason, for a file that cannot be read, is no GGUF file or is truncated,
    and for a tensor of a type that is not read, with its name.
    """
    with open_path(path, str(path)) as stream:
        try:
            size = stream.seek(0, 2)
            stream.seek(0)
            return _HeaderReader(path.name, stream, size).header()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error


@dataclass
class _HeaderReader:
    """Reads one header from its begin to its end."""

    file: str
    stream: BinaryIO
    size: int
    metadata: dict[str, Any] = field(default_factory=dict)

    def header(self) -> GgufHeader:
        magic = self.stream.read(4)
        if magic != MAGIC:
            raise ConfigError(f"{self.file} is no GGUF file: it begins with {magic!r}, expected {MAGIC!r}")
        version = self._number("I")
        if version not in VERSIONS:
            raise ConfigError(f"{self.file}: GGUF version takes {' or '.join(map(str, VERSIONS))}, got {version}")
        num_tensors, num_values = self._number("Q"), self._number("Q")
        if num_tensors > MAX_TENSORS:
            raise ConfigError(f"{self.file} is damaged: its header names {num_tensors} tensors")
        for _ in range(num_values):
            key = self._string()
            value = self._value(self._number("I"), key.startswith(KEPT))
            if value is not None:
                self.metadata[key] = value
        tensors: dict[str, GgufTensor] = {}
        for _ in range(num_tensors):
            name, tensor = self._tensor()
            if name in tensors:
                raise ConfigError(f"{self.file} is damaged: it has two tensors {name}")
            tensors[name] = tensor
        return GgufHeader(self._placed(tensors), str(self.metadata.get(ARCHITECTURE, "")))

    def _placed(self, tensors: Mapping[str, GgufTensor]) -> dict[str, GgufTensor]:
        """Tensors with places in the file instead of places after its header."""
        alignment = self.metadata.get(ALIGNMENT, 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise ConfigError(f"{self.file} is damaged: its {ALIGNMENT} is {alignment}")
        start = -(-self.stream.tell() // alignment) * alignment
        placed = {name: tensor._replace(first=start + tensor.first) for name, tensor in tensors.items()}
        self._check_size(max((tensor.first + tensor.num_bytes for tensor in placed.values()), default=0))
        return placed

    def _tensor(self) -> tuple[str, GgufTensor]:
        name, num_dims = self._string(), self._number("I")
        if num_dims > MAX_DIMS:
            raise ConfigError(f"{self.file} is damaged: {name} has {num_dims} dims")
        shape = tuple(self._number("Q") for _ in range(num_dims))[::-1]
        number, first = self._number("I"), self._number("Q")
        if first % 8:
            raise ConfigError(f"{self.file} is damaged: {name} begins at byte {first} of the tensors")
        if (kind := TYPES.get(number)) is None:
            read = ", ".join(each.name for each in TYPES.values())
            known = OTHER_TYPES.get(number, "unknown")
            raise ConfigError(f"{self.file}: {name} has type {number} ({known}); types that are read are {read}")
        if kind.is_compressed and (not shape or shape[-1] % kind.block_numbers):
            raise ConfigError(f"{self.file} is damaged: {name} has shape {shape}, in blocks of {kind.block_numbers}")
        original = self.metadata.get(ORIGINAL_SHAPE + name)
        if isinstance(original, list) and math.prod(original) == math.prod(shape):
            shape = tuple(original)
        return name, GgufTensor(kind, shape, first)

    def _value(self, kind: int, is_kept: bool) -> Any:
        """Next value of the metadata; None for one that is not kept."""
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ConfigError(f"{self.file} is damaged: its metadata has a value of type {kind}")
        kind, length = self._number("I"), self._number("Q")
        if kind == _ARRAY:
            raise ConfigError(f"{self.file} is damaged: its metadata has an array of arrays")
        if kind in _SCALARS and not is_kept:
            self._skip(length * struct.calcsize(_SCALARS[kind]))
            return None
        values = [self._value(kind, is_kept) for _ in range(length)]
        return values if is_kept else None

    def _string(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8", "replace")

    def _number(self, form: str) -> Any:
        return struct.unpack("<" + form, self._bytes(struct.calcsize(form)))[0]

    def _skip(self, count: int) -> None:
        self._check_size(self.stream.tell() + count)
        self.stream.seek(count, 1)

    def _bytes(self, count: int) -> bytes:
        self._check_size(self.stream.tell() + count)
        return self.stream.read(count)

    def _check_size(self, needed: int) -> None:
        if needed > self.size:
            raise ConfigError(f"{self.file} is truncated or damaged: it has {self.size} bytes and needs {needed}")
