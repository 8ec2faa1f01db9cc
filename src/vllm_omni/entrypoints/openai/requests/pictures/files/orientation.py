"""Orientation of a picture from its metadata, of which nothing else is read."""

from __future__ import annotations

import re
import struct

from vllm_omni.entrypoints.openai.requests.pictures.files.base import UPRIGHT

_PREFIX = b"Exif\0\0"
_ORDERS = {b"II": "<", b"MM": ">"}
_TIFF_NUMBERS = (42, 42 << 8)
"""Magic number of TIFF. Faulty encoders write the second value, which most decoders accept."""
_TAG = 0x0112
_FORMATS = {1: "B", 3: "H", 4: "I"}
"""Format character of `struct` for the TIFF types BYTE, SHORT and LONG."""
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
MAX_XMP_BYTES = 2**20


def orientation(exif: bytes | None, xmp: bytes | None) -> int:
    """Orientation from EXIF, or from XMP if EXIF has none."""
    return _exif_orientation(exif or b"") or _xmp_orientation(xmp or b"") or UPRIGHT


def _exif_orientation(exif: bytes) -> int | None:
    """Value of the orientation tag in the first directory (IFD0). Other tags are not read, so they may be invalid."""
    start = len(_PREFIX) if exif.startswith(_PREFIX) else 0
    order = _ORDERS.get(exif[start : start + 2])
    if order is None or len(exif) < start + 8:
        return None
    number, offset = struct.unpack_from(f"{order}HI", exif, start + 2)
    begin = start + offset + 2
    if number not in _TIFF_NUMBERS or len(exif) < begin:
        return None
    (count,) = struct.unpack_from(f"{order}H", exif, begin - 2)
    entries = exif[begin : begin + 12 * count]
    for tag, kind, length, value in struct.iter_unpack(f"{order}HHI4s", entries[: len(entries) // 12 * 12]):
        if tag == _TAG and length == 1 and kind in _FORMATS:
            return int(struct.unpack_from(order + _FORMATS[kind], value)[0])
    return None


def _xmp_orientation(xmp: bytes) -> int | None:
    found = _IN_XMP.search(xmp[:MAX_XMP_BYTES])
    return int(found[1]) if found else None
