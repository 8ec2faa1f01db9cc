"""Picture files that are small and expensive to decode, or valid and unusual."""

from __future__ import annotations

import re
import struct
import zlib

from PIL import Image

from tests.entrypoints.openai.routes.test_image_edits import file_of

_SCAN = 0xDA
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
PNG_HEADER_BYTES = 33
"""Beginning of a PNG file: signature and IHDR."""


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """`png` with more chunks after its header."""
    return png[:PNG_HEADER_BYTES] + b"".join(chunks) + png[PNG_HEADER_BYTES:]


def without_chunk(png: bytes, kind: bytes) -> bytes:
    start = png.index(kind) - 4
    (length,) = struct.unpack_from(">I", png, start)
    return png[:start] + png[start + 12 + length :]


def segment(marker: int, body: bytes) -> bytes:
    """A segment of a JPEG file."""
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    """`jpeg` with more segments after its first marker."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def with_repeated_scan(side: int, count: int) -> bytes:
    """A grey progressive JPEG whose last scan, a few bytes, is repeated `count` times."""
    jpeg = file_of(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = jpeg.rindex(bytes((0xFF, _SCAN)))
    end = jpeg.rindex(b"\xff\xd9")
    assert _MARKER.search(jpeg, last + 2).start() == end  # type: ignore[union-attr]
    return jpeg[:end] + jpeg[last:end] * count + jpeg[end:]


def lying_exif(num_tags: int) -> bytes:
    """TIFF whose text tags all point beyond its end."""
    tags = b"".join(struct.pack("<HHII", number + 1, 2, 1000, 0x7FFFFF00) for number in range(num_tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", num_tags) + tags + bytes(4)
