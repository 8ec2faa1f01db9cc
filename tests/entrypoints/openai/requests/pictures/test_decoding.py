"""Decoding of picture files: the pixels equal Pillow's, with any metadata in the file."""

from __future__ import annotations

import io
import logging
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from testbed.tiny_models import photo
from tests.entrypoints.openai.requests.hostile_files import (
    chunk,
    lying_exif,
    segment,
    with_chunks,
    with_repeated_scan,
    with_segments,
    without_chunk,
)
from tests.entrypoints.openai.routes.test_image_edits import file_of
from vllm_omni.entrypoints.openai.requests.pictures.worker import open_image, read_file
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.images import to_rgb

PHOTO = photo(61, 43, 1)
CLEAR = Image.merge("RGBA", (*PHOTO.split(), photo(61, 43, 2).getchannel(0)))
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PNG, JPEG, WEBP = (file_of(PHOTO, kind) for kind in ("PNG", "JPEG", "WEBP"))
PALETTE = file_of(PHOTO.quantize(64))


def by_pillow(data: bytes) -> np.ndarray:
    """Pixels of the unchanged file, read by Pillow with all metadata."""
    image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    turn = turns.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return np.asarray(to_rgb(image if turn is None else image.transpose(turn)))


def check(data: bytes) -> None:
    expected = by_pillow(data)
    np.testing.assert_array_equal(np.asarray(open_image(data).decoded()), expected)
    assert open_image(data).size == expected.shape[1::-1]


def exif_of(orientation: int) -> bytes:
    exif: Any = Image.Exif()
    exif.update({0x010E: "a photo", 0x0112: orientation, 0x011A: 72.0})
    data: bytes = exif.tobytes()
    return data


FILES: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
    "png": (PHOTO, "PNG", {}),
    "png with alpha": (CLEAR, "PNG", {}),
    "png with a transparent colour": (PHOTO, "PNG", {"transparency": PHOTO.getpixel((0, 0))}),
    "grey png": (PHOTO.convert("L"), "PNG", {"transparency": 128}),
    "grey png with alpha": (CLEAR.convert("LA"), "PNG", {}),
    "bilevel png": (PHOTO.convert("1"), "PNG", {}),
    "palette": (PHOTO.quantize(64), "PNG", {}),
    "palette with alpha": (PHOTO.quantize(64), "PNG", {"transparency": bytes(range(64))}),
    "jpeg": (PHOTO, "JPEG", {}),
    "progressive jpeg": (PHOTO, "JPEG", {"progressive": True, "subsampling": 0}),
    "grey jpeg": (PHOTO.convert("L"), "JPEG", {"comment": b"x"}),
    "cmyk jpeg": (PHOTO.convert("CMYK"), "JPEG", {}),
    "rgb jpeg": (PHOTO, "JPEG", {"keep_rgb": True}),
    "webp": (PHOTO, "WEBP", {}),
    "lossless webp": (CLEAR, "WEBP", {"lossless": True}),
    "webp with alpha": (CLEAR, "WEBP", {"exact": True}),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_that_pillow_reads(name: str) -> None:
    image, kind, options = FILES[name]
    check(file_of(image, kind, **options))
    check(file_of(image, kind, exif=exif_of(6), icc_profile=PROFILE, **options))


def test_a_jpeg_is_in_the_colours_that_its_segments_say() -> None:
    """The JFIF segment means YCbCr; Adobe's contains the transform; without both, the component names decide."""
    end_of_jfif = 4 + struct.unpack_from(">H", JPEG, 4)[0]
    assert JPEG[6:11] == b"JFIF\0"
    bare = JPEG[:2] + JPEG[end_of_jfif:]
    adobe = [with_segments(bare, segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))) for transform in (0, 1)]
    first, second = map(by_pillow, adobe)
    assert not np.array_equal(first, second)
    frame = bare.index(b"\xff\xc0") + 10
    named = bytearray(JPEG)
    for component, name in enumerate(b"RGB"):
        position = frame + end_of_jfif - 2 + 3 * component
        assert named[position] == component + 1
        named[position] = name
        scan = named.rindex(b"\xff\xda") + 5 + 2 * component
        assert named[scan] == component + 1
        named[scan] = name
    assert not np.array_equal(by_pillow(bytes(named)), by_pillow(bytes(named[:2] + named[end_of_jfif:])))
    for data in (bare, *adobe, bytes(named), bytes(named[:2] + named[end_of_jfif:])):
        check(data)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_orientation_is_honoured(kind: str, orientation: int) -> None:
    """The orientation is in EXIF, or in XMP if there is no EXIF; also after the pixels and in both byte orders."""
    check(file_of(PHOTO, kind, exif=exif_of(orientation)))
    big_endian = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + struct.pack(">HHI", orientation, 0, 0)
    check(file_of(PHOTO, kind, exif=big_endian))
    xmp = f'<x:xmpmeta tiff:Orientation="{orientation}"/>'
    if kind != "PNG":
        check(file_of(PHOTO, kind, xmp=xmp.encode()))
        return
    check(PNG[:-12] + chunk(b"eXIf", exif_of(orientation)[6:]) + PNG[-12:])
    for is_compressed in (False, True):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp, zip=is_compressed)
        check(file_of(PHOTO, pnginfo=info))
        info = PngImagePlugin.PngInfo()
        digits = exif_of(orientation).hex()
        lines = "\n".join(digits[i : i + 72] for i in range(0, len(digits), 72))
        info.add_text("Raw profile type exif", f"\nexif\n{len(digits) // 2:8}\n{lines}\n", zip=is_compressed)
        check(file_of(PHOTO, pnginfo=info))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "MPO"])
def test_of_several_pictures_the_first_is_taken(kind: str) -> None:
    frames = [photo(61, 43, seed) for seed in range(4)]
    data = file_of(frames[0], kind, save_all=True, append_images=frames[1:])
    check(data)
    assert len(read_file(data).data) < 0.6 * len(data), "the others are not even given to the decoder"


def test_metadata_that_nobody_reads_does_not_decide() -> None:
    text = b"workflow\0" + b"x" * 3 * 2**20
    deflated = zlib.compress(b"y" * 3 * 2**20)
    for extra in (
        chunk(b"tEXt", text),
        chunk(b"zTXt", b"workflow\0\0" + deflated),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + deflated),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2 * 2**20))),
        chunk(b"iCCP", b""),
        chunk(b"iCCP", b"profile\0"),
        chunk(b"tEXt", b"a\0b")[:-1] + b"?",
        chunk(b"gAMA", b"1234")[:-1] + b"?",
        chunk(b"eXIf", exif_of(6)[6:])[:-1] + b"?",
        chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
        chunk(b"acTL", b""),
        chunk(b"zTXt", b"XML:com.adobe.xmp\0\0" + deflated) * 20_000,  # 60 GB of text
        chunk(b"zTXt", b"XML:com.adobe.xmp\0\0broken"),
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n2\nzz"),
    ):
        np.testing.assert_array_equal(np.asarray(open_image(with_chunks(PNG, extra)).decoded()), np.asarray(PHOTO))
    expected = np.asarray(open_image(JPEG).decoded())
    for extra in (
        segment(0xE2, b"MPF\0" + bytes(20)),
        segment(0xE1, b"Exif\0\0II*\0\xff"),
        segment(0xFE, b"x" * 65533),
    ):
        np.testing.assert_array_equal(np.asarray(open_image(with_segments(JPEG, *[extra] * 50)).decoded()), expected)


BROKEN = {
    "palette picture without a palette": without_chunk(PALETTE, b"PLTE"),
    "tRNS with a second IHDR": with_chunks(PNG, chunk(b"tRNS", bytes(6)), PNG[8:33]),
    "tRNS that is too short": with_chunks(PNG, chunk(b"tRNS", b"")),
    "tRNS with a broken checksum": with_chunks(PNG, chunk(b"tRNS", bytes(6))[:-1] + b"?"),
    "a chunk before IHDR": PNG[:8] + chunk(b"PLTE", bytes(3)) + PNG[8:],
    "no chunk at all": PNG[:8],
    "jpeg without a frame": b"\xff\xd8\xff\xd9",
    "jpeg in jpeg": with_segments(JPEG, JPEG),
    "scan before the frame": with_segments(JPEG, segment(0xDA, bytes(10))),
    "segment of no length": with_segments(JPEG, b"\xff\xe1\0\0"),
    "no chunk in webp": WEBP[:12],
    "webp that begins with EXIF": WEBP[:12] + b"EXIF\4\0\0\0abcd" + WEBP[12:],
}


@pytest.mark.parametrize("name", BROKEN)
def test_whatever_pillow_makes_of_a_file_it_is_broken(name: str) -> None:
    kind = {b"\x89P": "PNG", b"\xff\xd8": "JPEG", b"RI": "W"}[BROKEN[name][:2]]
    with pytest.raises(InvalidRequestError, match=f"^image is a broken {kind}") as raised:
        open_image(BROKEN[name]).decoded()
    assert raised.value.param == "image"


def test_what_costs_much_is_refused_before_it_is_decoded() -> None:
    for data, says in (
        (with_repeated_scan(5792, 32), "JPEG files of this size with at most 32 scans"),
        (with_repeated_scan(16, 1000), "JPEG files with at most 1000 scans"),
        (with_segments(JPEG, segment(0xE1, b"Exif\0\0") * 20_000), "JPEG files with at most 16384 segments"),
        (with_segments(JPEG, segment(0xDB, bytes(65)) * 16_000), "JPEG files with at most 1048576 bytes of tables"),
        (with_chunks(PNG, chunk(b"IDAT", b"") * 70_000), "PNG files with at most 65536 chunks"),
        (WEBP + b"ABCD\0\0\0\0" * 20_000, "WebP files with at most 16384 chunks"),
        (PNG[:16] + struct.pack(">II", 10_000, 10_000) + PNG[24:], "at most 33554432 pixels, got 10000x10000"),
        (WEBP[:12] + b"VP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6 + WEBP[12:], "at most 33554432 pixels, got 16777216x"),
    ):
        with pytest.raises(InvalidRequestError, match=says):
            read_file(data)
    read_file(with_repeated_scan(5792, 20))
    check(with_repeated_scan(16, 900))


def test_lies_in_exif_are_neither_read_nor_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for data in (with_chunks(PNG, chunk(b"eXIf", lying_exif(65_000))), with_segments(JPEG, segment(0xE1, b"Exif\0\0"))):
        open_image(data).decoded()
    assert sum(len(record.getMessage()) for record in caplog.records) < 4000


def mutated(whole: bytes, dice: random.Random) -> bytes:
    """A file with bytes flipped, dropped, moved or cut off."""
    data = bytearray(whole)
    for _ in range(dice.randint(1, 4)):
        if not data:
            break
        position = dice.randrange(len(data) if dice.random() < 0.5 else min(len(data), 700))
        match dice.randrange(5):
            case 0:
                data[position] = dice.randrange(256)
            case 1:
                del data[position : position + dice.randint(1, 9)]
            case 2:
                del data[position:]
                data += b"\0"
            case 3:
                start = dice.randrange(len(data))
                data[position:position] = data[start : start + dice.randint(1, 60)]
            case 4:
                data[position] ^= 1 << dice.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_whatever_breaks_in_a_file_is_the_senders_fault(name: str) -> None:
    """Hundreds of broken files: a picture or InvalidRequestError."""
    image, kind, options = FILES[name]
    whole = file_of(image, kind, exif=exif_of(6), **options)
    dice = random.Random(len(whole))
    num_refused = 0
    for _ in range(400):
        try:
            assert open_image(mutated(whole, dice)).decoded().mode == "RGB"
        except InvalidRequestError:
            num_refused += 1
    assert num_refused > 50
