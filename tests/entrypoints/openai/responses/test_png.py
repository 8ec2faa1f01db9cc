"""The PNG encoder: valid files, with the right pixels, about as small as Pillow's."""

from __future__ import annotations

import asyncio
import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from benchmarks.pictures import PICTURES, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vllm_omni.entrypoints.openai.responses.png import encode_png

SIDES = st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 511, 513, 1023]))


def chunks_of(file: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and data of each chunk, after checks of the signature, each length and each CRC."""
    assert file[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = [], 8
    while place < len(file):
        (size,), kind = struct.unpack_from(">I", file, place), file[place + 4 : place + 8]
        data = file[place + 8 : place + 8 + size]
        assert len(data) == size
        assert struct.unpack_from(">I", file, place + 8 + size) == (zlib.crc32(kind + data),)
        chunks.append((kind, data))
        place += 12 + size
    return chunks


def filtered_rows(file: bytes) -> np.ndarray:
    """[height, 1 + 3 * width]: each row's filter type and bytes, after checks of everything around them."""
    (first, header), *body, last = chunks_of(file)
    assert (first, last) == (b"IHDR", (b"IEND", b""))
    assert {kind for kind, _ in body} == {b"IDAT"}, "no metadata"
    width, height, *rest = struct.unpack(">IIBBBBB", header)
    assert rest == [8, 2, 0, 0, 0]
    inflate = zlib.decompressobj()
    rows = inflate.decompress(b"".join(data for _, data in body))
    assert inflate.eof
    assert not inflate.unused_data
    assert len(rows) == height * (1 + 3 * width)
    return np.frombuffer(rows, np.uint8).reshape(height, -1)


def pillow_pixels(file: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(file))
    assert image.mode == "RGB"
    return np.asarray(image)


def pillow_file(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


@given(st.sampled_from(sorted(PICTURES)), SIDES, SIDES, st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_pillow_reads_the_same_pixels_in_any_size(kind: str, height: int, width: int, seed: int) -> None:
    pixels = picture(kind, height, width, seed)
    file = encode_png(pixels)
    assert filtered_rows(file).shape == (height, 1 + 3 * width)
    np.testing.assert_array_equal(pillow_pixels(file), pixels)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (16384, 1), (1, 16384), (300, 16384)])
def test_extreme_sizes(height: int, width: int) -> None:
    pixels = picture("noise", height, width)
    file = encode_png(pixels)
    filtered_rows(file)
    np.testing.assert_array_equal(pillow_pixels(file), pixels)


def test_each_part_of_a_picture_gets_the_filter_that_suits_it() -> None:
    random = np.random.default_rng(0)
    pixels = np.empty((768, 64, 3), np.uint8)
    pixels[:256] = random.choice(np.array([0, 255], np.uint8), (256, 64, 1))  # two values: as it is
    pixels[256:512] = random.integers(0, 256, (256, 1, 3)) * np.arange(64)[:, None] % 256  # a slope in each row
    pixels[512:] = random.integers(0, 256, (1, 64, 3))  # equal along a column
    file = encode_png(pixels)
    assert filtered_rows(file)[::256, 0].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(pillow_pixels(file), pixels)


@pytest.mark.parametrize("kind", ["photograph", "drawing", "text"])
def test_sizes_are_within_15_percent_of_pillows(kind: str) -> None:
    pixels = picture(kind, 512, 512)
    assert len(encode_png(pixels)) <= 1.15 * len(pillow_file(pixels))


def test_arrays_in_any_memory_layout() -> None:
    pixels = picture("photograph", 40, 50)
    expected = encode_png(pixels)
    channels_first = np.ascontiguousarray(pixels.transpose(2, 0, 1)).transpose(1, 2, 0)
    flipped = np.ascontiguousarray(pixels[::-1, ::-1])[::-1, ::-1]
    assert encode_png(channels_first) == encode_png(flipped) == expected
    read_only = pixels.copy()
    read_only.flags.writeable = False
    assert encode_png(read_only) == expected


def test_the_same_pixels_give_the_same_bytes_also_beside_others() -> None:
    pictures = [picture(kind, 600, 100) for kind in sorted(PICTURES)]
    expected = [encode_png(pixels) for pixels in pictures]
    with ThreadPoolExecutor(4) as threads, ThreadPoolExecutor(3) as bands:
        encoded = threads.map(lambda pixels: encode_png(pixels, bands.map), pictures * 8)
        assert list(encoded) == expected * 8


@pytest.mark.parametrize("pixels", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))])
def test_other_pixels_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises((AssertionError, ValueError)):
        encode_png(pixels)


async def test_the_event_loop_runs_on_beside_the_encoder() -> None:
    """The longest pause of the loop is a small part of an encoder's run in a thread.

    A busy machine may pause the loop, too. So one quiet run is enough: if C code kept the GIL, every run would have a
    pause of 9 tenths.
    """
    pixels = picture("noise", 256, 16384)  # few, long calls into C

    async def longest_pause() -> float:
        loop = asyncio.get_running_loop()
        start = last = loop.time()
        longest, encoding = 0.0, loop.run_in_executor(None, encode_png, pixels)
        while not encoding.done():
            await asyncio.sleep(0)
            now = loop.time()
            longest, last = max(longest, now - last), now
        return longest / (last - start)

    shares: list[float] = []
    while not shares or shares[-1] > 0.4:
        assert len(shares) < 50, shares
        shares.append(await longest_pause())
