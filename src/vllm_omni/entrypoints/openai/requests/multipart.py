"""Parser of `multipart/form-data` that limits the size of each part while the body arrives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException

from vllm_omni.errors import InvalidRequestError

MAX_PARTS = 128


@dataclass
class Part:
    """One field of a form."""

    name: str
    is_file: bool
    data: bytearray = field(default_factory=bytearray)


class MultipartReader:
    """Takes the body in pieces and returns the parts that are complete.

    limit_of: called with a part that has its name and no data yet; returns the most bytes of its data.
    """

    def __init__(self, content_type: str, limit_of: Callable[[Part], int]) -> None:
        """Make a reader for one body. Raises InvalidRequestError for a content type without a usable boundary."""
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise InvalidRequestError("the request's multipart/form-data names no boundary")
        self._limit_of = limit_of
        self._headers: dict[bytes, bytes] = {}
        self._header_name = self._header_value = b""
        self._part = Part("", is_file=False)
        self._limit = self._num_parts = 0
        self._complete: list[Part] = []
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._on_header_name,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._on_data,
                    "on_part_end": self._end,
                    "on_end": self._finish,
                },
            )
        except FormParserError as error:
            raise InvalidRequestError(f"the request is not valid multipart/form-data: {error}") from error

    def feed(self, data: bytes) -> list[Part]:
        """Parse `data`; return the parts that are complete now.

        Raises InvalidRequestError for an invalid form, HTTPException (413) for a part beyond its limit.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidRequestError(f"the request is not valid multipart/form-data: {error}") from error
        complete, self._complete = self._complete, []
        return complete

    def close(self) -> None:
        """End of the body. Raises InvalidRequestError if the form is incomplete."""
        if not self._ended:
            raise InvalidRequestError("the request's multipart/form-data ends in the middle")

    def _begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise InvalidRequestError(f"a form has at most {MAX_PARTS} parts")
        self._headers = {}

    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b"").decode("latin-1"))
        # Names are sent as UTF-8 and parsed as Latin-1.
        name = options.get(b"name", b"").decode(errors="replace")
        # A browser sends `filename=""` if no file was chosen: the field is then empty and no file.
        self._part = Part(name, is_file=bool(options.get(b"filename")))
        self._limit = self._limit_of(self._part)

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if len(self._part.data) + end - start > self._limit:
            kind = "file" if self._part.is_file else "part"
            raise HTTPException(413, f"The {kind} {self._part.name[:64]!r} is larger than {self._limit} bytes.")
        self._part.data += data[start:end]

    def _end(self) -> None:
        self._complete.append(self._part)

    def _finish(self) -> None:
        self._ended = True
