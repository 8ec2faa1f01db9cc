"""Reader of WebP files: keeps only the chunks that determine the pixels of the first frame."""

from __future__ import annotations

import struct

from vllm_omni.entrypoints.openai.requests.pictures.files.base import PictureFile, broken, check_count, check_size
from vllm_omni.entrypoints.openai.requests.pictures.files.orientation import orientation

MAX_CHUNKS = 2**14
_HEADER_BYTES = 12
"""Length of the header: `RIFF`, number of bytes that follow, `WEBP`."""
_CHUNK = struct.Struct("<4sI")
_KEPT = (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")
"""Kinds of chunks of which the first is kept. ANMF is a frame of an animation."""
_SIZE_BYTES = {b"VP8X": 10, b"VP8 ": 10, b"VP8L": 5}
"""Bytes from the beginning of the first chunk's body to the end of the picture's size in it."""


def is_webp(data: bytes) -> bool:
    return data.startswith(b"RIFF") and data[8:_HEADER_BYTES] == b"WEBP"


def read_webp(data: bytes) -> PictureFile:
    """Read a WebP file. Raises InvalidRequestError."""
    pieces: dict[bytes, bytes] = {}
    metadata: dict[bytes, bytes] = {}
    position, num_chunks = _HEADER_BYTES, 0
    while len(data) - position >= _CHUNK.size:
        num_chunks += 1
        check_count("WebP", num_chunks, MAX_CHUNKS, "chunks")
        kind, length = _CHUNK.unpack_from(data, position)
        start, end = position + _CHUNK.size, position + _CHUNK.size + length + length % 2
        if num_chunks == 1:
            _check_first(kind, data[start : start + 10])
        if kind in _KEPT:
            pieces.setdefault(kind, data[position:end])
        elif kind in (b"EXIF", b"XMP "):
            metadata.setdefault(kind, data[start : start + length])
        position = end
    if not pieces:
        raise broken("WebP")
    body = b"WEBP" + b"".join(pieces.values())
    whole = _CHUNK.pack(b"RIFF", len(body)) + body
    return PictureFile("WEBP", whole, orientation(metadata.get(b"EXIF"), metadata.get(b"XMP ")))


def _check_first(kind: bytes, body: bytes) -> None:
    """Check the picture's size, which the first chunk contains. Raises InvalidRequestError."""
    if kind not in _SIZE_BYTES or len(body) < _SIZE_BYTES[kind]:
        raise broken("WebP")
    if kind == b"VP8X":  # 3 bytes for each side, which store the side minus 1
        width, height = (int.from_bytes(body[at : at + 3], "little") + 1 for at in (4, 7))
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", body, 6))
    else:  # 14 bits for each side, which store the side minus 1, after a signature
        bits = int.from_bytes(body[1:5], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    check_size("WebP", width, height)
