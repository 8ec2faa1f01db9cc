"""Reader of JPEG files: keeps only the segments that determine the pixels, and limits the scans."""

from __future__ import annotations

import re
import struct

from vllm_omni.entrypoints.openai.requests.pictures.files.base import PictureFile, broken, check_count, check_size
from vllm_omni.entrypoints.openai.requests.pictures.files.orientation import orientation
from vllm_omni.errors import InvalidRequestError

SIGNATURE = b"\xff\xd8\xff"
MAX_SEGMENTS = 2**14
MAX_SCANS = 1000
MAX_SCANNED_PIXELS = 2**30
"""Most scans times pixels. A decoder visits every pixel in each scan (about a nanosecond), even if the scan is empty.
Encoders write about ten scans; this allows 32 for the largest picture."""
MAX_TABLE_BYTES = 2**20
"""Most bytes of all tables and headers. A picture needs a few hundred, and as many for each further scan."""
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
"""Marker of a segment. Fill bytes, escaped bytes of compressed data, and restart markers do not match."""
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_TABLES = frozenset((0xC4, 0xCC, 0xDB, 0xDD))
"""Markers of Huffman tables, arithmetic conditioning, quantization tables, and the restart interval."""
_APP0, _APP1, _APP14 = 0xE0, 0xE1, 0xEE
_EXIF = b"Exif\0\0"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"


def read_jpeg(data: bytes) -> PictureFile:
    """Read a JPEG file. Raises InvalidRequestError."""
    reader = _Reader(data)
    while reader.step():
        pass
    if reader.num_pixels == 0:
        raise broken("JPEG")
    return PictureFile("JPEG", b"".join(reader.pieces), orientation(reader.exif, reader.xmp))


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.pieces = [data[:2]]
        self.exif: bytes | None = None
        self.xmp: bytes | None = None
        self.num_pixels = 0
        self._data = data
        self._position = 2
        self._num_segments = self._num_scans = self._num_table_bytes = 0

    def step(self) -> bool:
        """Read the next segment; False at the end of the picture or of an incomplete file."""
        found = _MARKER.search(self._data, self._position)
        if found is None:
            return False
        self._num_segments += 1
        check_count("JPEG", self._num_segments, MAX_SEGMENTS, "segments")
        marker, start = found[0][1], found.start()
        if marker == _END:
            self.pieces.append(found[0])
            return False
        if marker == _START:
            raise broken("JPEG")
        if len(self._data) < found.end() + 2:
            return False
        (length,) = struct.unpack_from(">H", self._data, found.end())
        if length < 2:
            raise broken("JPEG")
        self._position = found.end() + length
        self._take(marker, start, self._data[found.end() + 2 : self._position])
        return True

    def _take(self, marker: int, start: int, body: bytes) -> None:
        if marker == _SCAN:
            self._take_scan(start)
        elif marker in _FRAMES:
            self._take_frame(body)
            self._keep(start)
        elif marker in _TABLES or self._tells_colours(marker, body):
            self._keep(start)
        elif marker == _APP1 and body.startswith(_EXIF):
            self.exif = self.exif or body
        elif marker == _APP1 and body.startswith(_XMP):
            self.xmp = self.xmp or body

    def _tells_colours(self, marker: int, body: bytes) -> bool:
        """Whether decoders read the colour space from this segment."""
        return (marker == _APP0 and body.startswith(b"JFIF\0")) or (marker == _APP14 and body.startswith(b"Adobe"))

    def _take_frame(self, body: bytes) -> None:
        if self.num_pixels or len(body) < 6:
            raise broken("JPEG")
        height, width = struct.unpack_from(">HH", body, 1)
        check_size("JPEG", width, height)
        self.num_pixels = height * width

    def _take_scan(self, start: int) -> None:
        """Keep the scan's header and its compressed data, up to the next segment."""
        if not self.num_pixels:
            raise broken("JPEG")
        self._num_scans += 1
        check_count("JPEG", self._num_scans, MAX_SCANS, "scans")
        if self._num_scans > 1 and self._num_scans * self.num_pixels > MAX_SCANNED_PIXELS:
            most = MAX_SCANNED_PIXELS // self.num_pixels
            raise InvalidRequestError(f"image takes JPEG files of this size with at most {most} scans", param="image")
        found = _MARKER.search(self._data, self._position)
        self._position = len(self._data) if found is None else found.start()
        self.pieces.append(self._data[start : self._position])

    def _keep(self, start: int) -> None:
        piece = self._data[start : self._position]
        self._num_table_bytes += len(piece)
        check_count("JPEG", self._num_table_bytes, MAX_TABLE_BYTES, "bytes of tables")
        self.pieces.append(piece)
