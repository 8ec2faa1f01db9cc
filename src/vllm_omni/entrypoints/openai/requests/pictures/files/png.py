"""PNG files: only the chunks that make the pixels are kept."""

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
"""All others describe the pixels (text, colour profile, resolution, time) or are other frames of an animation."""
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_RAW_EXIF = b"Raw profile type exif"
"""Keyword of the text chunk in which ImageMagick wrote EXIF, as hexadecimal digits, before PNG had a chunk for it."""
_XMP = b"XML:com.adobe.xmp"
_RAW_EXIF_LINES = 3
"""Lines of a raw profile before its digits: empty, name, length."""


def read_png(data: bytes) -> PictureFile:
    """Raises InvalidRequestError."""
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
            if (kind == b"IHDR") != (len(pieces) == 1):  # the first chunk, and the only one of its kind
                raise broken("PNG")
            if kind == b"IHDR":
                _check_header(data[start:end])
            pieces.append(data[position:end])
        elif not kind.isalpha():  # no chunk begins here; what comes after the pixels does not matter
            break
        elif kind == b"eXIf" and _is_intact(data, position, end):
            exif = data[start : end - _CHECKSUM.size]
        elif kind in _TEXT:
            for keyword in (_RAW_EXIF, _XMP):
                if keyword not in texts and data.startswith(keyword + b"\0", start):  # one of each: it costs a megabyte
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
    """Raises InvalidRequestError."""
    if len(body) < _SIZE.size:
        raise broken("PNG")
    check_size("PNG", *_SIZE.unpack_from(body))


def _is_intact(data: bytes, position: int, end: int) -> bool:
    checked = end - _CHECKSUM.size
    return len(data) >= end and zlib.crc32(data[position + 4 : checked]) == _CHECKSUM.unpack_from(data, checked)[0]


def _text(kind: bytes, value: bytes) -> bytes:
    """Beginning of the text of a chunk tEXt, zTXt or iTXt, from what follows its keyword.

    No more of it is decompressed.
    """
    if kind == b"zTXt":
        return _inflated(value[1:])  # behind a byte for the method, of which there is one
    if kind == b"iTXt":
        is_compressed = value[:1] == b"\1"
        text = value[2:].partition(b"\0")[2].partition(b"\0")[2]  # behind language and translated keyword
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
