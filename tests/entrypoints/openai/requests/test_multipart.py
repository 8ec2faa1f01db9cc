"""The parser of forms: exact limits, and parts that arrive in pieces."""

from __future__ import annotations

from itertools import chain

import pytest
from starlette.exceptions import HTTPException

from vllm_omni.entrypoints.openai.requests.multipart import MAX_PARTS, MultipartReader, Part
from vllm_omni.errors import InvalidRequestError

LIMIT = 100


def make_reader() -> MultipartReader:
    return MultipartReader("multipart/form-data; boundary=x", lambda part: LIMIT)


def form_of(*values: bytes) -> bytes:
    parts = (
        b'--x\r\nContent-Disposition: form-data; name="%d"\r\n\r\n%s\r\n' % numbered for numbered in enumerate(values)
    )
    return b"".join((*parts, b"--x--\r\n"))


def fed(reader: MultipartReader, data: bytes, piece: int) -> list[list[Part]]:
    """Results of `reader` for each piece of `data`."""
    return [reader.feed(data[start : start + piece]) for start in range(0, len(data), piece)]


@pytest.mark.parametrize("piece", [1, 7, 10**6])
def test_parts_are_the_same_in_pieces_of_any_size(piece: int) -> None:
    values = (b"first", b"", b"with --x in it, and \r\n--y", b"z" * LIMIT)
    reader = make_reader()
    parts = fed(reader, form_of(*values), piece)
    reader.close()
    assert [(part.name, bytes(part.data), part.is_file) for part in chain(*parts)] == [
        (str(number), value, False) for number, value in enumerate(values)
    ]


@pytest.mark.parametrize("piece", [1, 10**6])
def test_a_part_may_have_its_limit_and_no_byte_more(piece: int) -> None:
    reader, whole, longer = make_reader(), form_of(b"a" * LIMIT), form_of(b"a" * (LIMIT + 1))
    assert sum(len(parts) for parts in fed(reader, whole, piece)) == 1
    with pytest.raises(HTTPException, match="The part '0' is larger than 100 bytes") as caught:
        fed(make_reader(), longer, piece)
    assert caught.value.status_code == 413


def test_a_form_may_have_so_many_parts_and_not_one_more() -> None:
    reader = make_reader()
    assert len(reader.feed(form_of(*[b"v"] * MAX_PARTS))) == MAX_PARTS
    reader.close()
    with pytest.raises(InvalidRequestError, match=f"at most {MAX_PARTS} parts"):
        make_reader().feed(form_of(*[b"v"] * (MAX_PARTS + 1)))


@pytest.mark.parametrize("missing", [1, 3, 4, 6, 7, 30])
def test_a_form_without_its_end_is_refused(missing: int) -> None:
    """All bytes except the line end after the last boundary."""
    reader, whole = make_reader(), form_of(b"some value").removesuffix(b"\r\n")
    reader.feed(whole[:-missing])
    with pytest.raises(InvalidRequestError, match="ends in the middle"):
        reader.close()
    reader = make_reader()
    reader.feed(whole)
    reader.close()
