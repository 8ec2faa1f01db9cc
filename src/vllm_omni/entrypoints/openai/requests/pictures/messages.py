"""Messages between the server and a decode process."""

from __future__ import annotations

import msgspec
import numpy as np


class Decode(msgspec.Struct, tag=True, frozen=True):
    """Open this file; answered by `Opened` or `Refused`."""

    file: np.ndarray
    """uint8 [bytes]."""


class Resize(msgspec.Struct, tag=True, frozen=True):
    """Decode what was opened last, and resize it; answered by `Pixels` or `Refused`."""

    sizes: tuple[tuple[int, int], tuple[int, int]]
    """The two fields of `ReaderSizes`."""


class DecoderReady(msgspec.Struct, tag=True, frozen=True):
    """The process takes its first file."""


class Opened(msgspec.Struct, tag=True, frozen=True):
    """The file's header is read."""

    format: str
    width: int
    height: int


class Pixels(msgspec.Struct, tag=True, frozen=True):
    """uint8 [height, width, 3] for both readers, one array where their sizes are the same."""

    condition: np.ndarray
    reference: np.ndarray


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The file, or what it takes, is not accepted."""

    message: str


ToDecoder = Decode | Resize
FromDecoder = DecoderReady | Opened | Pixels | Refused
