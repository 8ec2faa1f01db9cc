"""Messages between the server and a decode process."""

from __future__ import annotations

import msgspec
import numpy as np


class Decode(msgspec.Struct, tag=True, frozen=True):
    """Command: read the header of a file. Answered by `Opened` or `Refused`."""

    file: np.ndarray
    """Content of the file: uint8 [bytes]."""


class Resize(msgspec.Struct, tag=True, frozen=True):
    """Command: decode the picture that was opened last, and resize it. Answered by `Pixels` or `Refused`."""

    sizes: tuple[tuple[int, int], tuple[int, int]]
    """The two fields of `ReaderSizes`: (width, height) in pixels."""


class DecoderReady(msgspec.Struct, tag=True, frozen=True):
    """The process has started and accepts files."""


class Opened(msgspec.Struct, tag=True, frozen=True):
    """Format and size of the picture that was opened."""

    format: str
    width: int
    height: int


class Pixels(msgspec.Struct, tag=True, frozen=True):
    """Pixels, uint8 [height, width, 3], for the text encoder and the VAE; one array if their sizes are equal."""

    condition: np.ndarray
    reference: np.ndarray


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The file is refused: for itself, or for the memory that it takes."""

    message: str


ToDecoder = Decode | Resize
FromDecoder = DecoderReady | Opened | Pixels | Refused
