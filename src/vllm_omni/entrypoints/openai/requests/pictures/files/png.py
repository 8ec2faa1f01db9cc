"""Reader of PNG files: keeps only the chunks that determine the pixels."""

from __future__ import annotations

import binascii
import struct
import zlib

from vllm_omni.entrypoints.openai.requests.pictures.files.base import PictureFile, broken, check_count, check_size
from vllm_omni.entrypoints.openai.requests.pictures.files.orientation import MAX_XMP_BYTES, orientation

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 2**16
_CHUNK = struct.Struct(">I4s")
_CHECKSUM = struct.Struct(">I")
_SIZE = struct.Struct(">II")
_OVERHEAD = _CHUNK.size + _CHECKSUM.size
_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
"""Chunks that are kept. All others are metadata (text, colour profile, ...) or further frames of an animation."""
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_RAW_EXIF = b"Raw profile type exif"
"""Keyword of the text chunk for EXIF in hexadecimal digits, which ImageMagick wrote before PNG had `eXIf`."""
_XMP = b"XML:com.adobe.xmp"
_RAW_EXIF_LINES = 3
"""Number of lines of a raw profile before its digits: empty, name, length."""


def read_png(data: bytes) -> PictureFile:
    """Read a PNG file. Raises InvalidRequestError."""
    pieces: list[bytes] = [SIGNATURE]
    exif: bytes | None = None
    texts: dict[bytes, bytes] = {}
    position, num_chunks = len(SIGNATURE), 0
    while len(data) - position >= _CHUNK.size:
        num_chunks += 1
        check_count("PNG", num_chunks, MAX_CHUNKS, "chunks")
        length, kind = _CHUNK.unpack_from(data, position)
        start, end = position + _CHUNK.size, position + _OVERHEAD + length
        if kind in _KEPT:
            if (kind == b"IHDR") != (len(pieces) == 1):  # IHDR must be the first chunk, and only the first
                raise broken("PNG")
            if kind == b"IHDR":
                _check_header(data[start:end])
            pieces.append(data[position:end])
        elif not kind.isalpha():  # not a chunk; data after the pixels does not matter
            break
        elif kind == b"eXIf" and _is_intact(data, position, end):
            exif = data[start : end - _CHECKSUM.size]
        elif kind in _TEXT:
            for keyword in (_RAW_EXIF, _XMP):
                # Only the first text of each keyword: each may take a megabyte.
                if keyword not in texts and data.startswith(keyword + b"\0", start):
                    texts[keyword] = _text(kind, data[start + len(keyword) + 1 : end - _CHECKSUM.size])
        if kind == b"IEND":
            break
        position = end
    if len(pieces) == 1:
        raise broken("PNG")
    if exif is None:
        exif = _raw_profile(texts.get(_RAW_EXIF, b""))
    return PictureFile("PNG", b"".join(pieces), orientation(exif, texts.get(_XMP)))


def _check_header(body: bytes) -> None:
    """Check the size in IHDR. Raises InvalidRequestError."""
    if len(body) < _SIZE.size:
        raise broken("PNG")
    check_size("PNG", *_SIZE.unpack_from(body))


def _is_intact(data: bytes, position: int, end: int) -> bool:
    checked = end - _CHECKSUM.size
    return len(data) >= end and zlib.crc32(data[position + 4 : checked]) == _CHECKSUM.unpack_from(data, checked)[0]


def _text(kind: bytes, value: bytes) -> bytes:
    """Beginning of the text of a chunk tEXt, zTXt or iTXt, which follows its keyword in `value`.

    The rest is not decompressed.
    """
    if kind == b"zTXt":
        return _inflated(value[1:])  # after a byte for the compression method; there is only one
    if kind == b"iTXt":
        is_compressed = value[:1] == b"\1"
        text = value[2:].partition(b"\0")[2].partition(b"\0")[2]  # after the language and the translated keyword
        return _inflated(text) if is_compressed else text
    return value


def _inflated(text: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(text, MAX_XMP_BYTES)
    except zlib.error:
        return b""


def _raw_profile(text: bytes) -> bytes | None:
    lines = text.split(b"\n", _RAW_EXIF_LINES)
    if len(lines) <= _RAW_EXIF_LINES:
        return None
    try:
        return binascii.unhexlify(lines[-1].replace(b"\n", b""))
    except ValueError:
        return None
