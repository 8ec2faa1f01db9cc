"""A decode process: `python -m vllm_omni.entrypoints.openai.requests.pictures.worker --socket-fd N --parent-pid P ...`.

It turns untrusted picture files into pixels. It can be killed at any time, logs nothing, and has limits that the kernel
enforces. It ends with its parent.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import resource
import signal
import socket
import warnings
from dataclasses import dataclass

# Readers that Pillow would otherwise import at the first file.
import PIL.JpegImagePlugin
import PIL.PngImagePlugin
import PIL.WebPImagePlugin  # noqa: F401
from PIL import Image

from vllm_omni.entrypoints.openai.requests.pictures.files import jpeg, png, webp
from vllm_omni.entrypoints.openai.requests.pictures.files.base import PictureFile, broken
from vllm_omni.entrypoints.openai.requests.pictures.messages import (
    Decode,
    DecoderReady,
    FromDecoder,
    Opened,
    Pixels,
    Refused,
    Resize,
    ToDecoder,
)
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.images import ReaderSizes, check_input_image, resized_pixels, to_rgb
from vllm_omni.processes.channel import BlockingChannel
from vllm_omni.processes.parent_death import die_with_parent

# EXIF's orientation -> transpose that turns the picture upright; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)


@dataclass(frozen=True)
class OpenedImage:
    """A picture with its header read and its pixels not decoded yet."""

    image: Image.Image
    orientation: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of the upright picture."""
        width, height = self.image.size
        return (height, width) if self.orientation in _SWAPS_SIDES else (width, height)

    def decoded(self) -> Image.Image:
        """Decode to RGB: turned upright, on white where the picture is transparent. Raises InvalidRequestError."""
        try:
            self.image.load()
            turn = _TURNS.get(self.orientation)
            return to_rgb(self.image if turn is None else self.image.transpose(turn))
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises many kinds for a broken picture
            raise broken(str(self.image.format)) from error


def open_image(data: bytes) -> OpenedImage:
    """Read the header of a picture file. Raises InvalidRequestError for other formats and broken or too large files."""
    file = read_file(data)
    try:
        with warnings.catch_warnings(action="ignore"):  # a client's file must not write to the log
            image = Image.open(io.BytesIO(file.data), formats=(file.format,))
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds for a broken picture
        raise broken(file.format) from error
    check_input_image(image)
    return OpenedImage(image, file.orientation)


def read_file(data: bytes) -> PictureFile:
    """Parts of a picture file that determine its pixels. Raises InvalidRequestError."""
    if data.startswith(png.SIGNATURE):
        return png.read_png(data)
    if data.startswith(jpeg.SIGNATURE):
        return jpeg.read_jpeg(data)
    if webp.is_webp(data):
        return webp.read_webp(data)
    raise InvalidRequestError("image takes PNG, JPEG and WebP files; this is none", param="image")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A decode process of the server; not for use by hand.")
    parser.add_argument("--socket-fd", type=int, required=True, help="the process's end of the channel")
    parser.add_argument("--parent-pid", type=int, required=True, help="the process ends when this one has")
    parser.add_argument("--memory-bytes", type=int, required=True, help="limit of its address space")
    parser.add_argument("--cpu-seconds", type=float, required=True, help="limit of its CPU time for a picture")
    options = parser.parse_args(arguments)
    die_with_parent(options.parent_pid)
    # The parent ends this process; a signal to the whole process group must not.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (options.memory_bytes, options.memory_bytes))
    warnings.simplefilter("ignore")
    channel: BlockingChannel[ToDecoder] = BlockingChannel(socket.socket(fileno=options.socket_fd), ToDecoder)
    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        channel.send(DecoderReady())
        decoder = DecodeWorker(options.cpu_seconds)
        while True:
            channel.send(decoder.answer(channel.receive()))


class DecodeWorker:
    """Answers messages. Keeps the picture that was opened last until it is decoded."""

    def __init__(self, cpu_seconds: float) -> None:
        self._cpu_seconds = cpu_seconds
        self._opened: OpenedImage | None = None

    def answer(self, message: ToDecoder) -> FromDecoder:
        try:
            return self._open(message) if isinstance(message, Decode) else self._pixels(message)
        except InvalidRequestError as error:
            return Refused(str(error))
        except MemoryError:
            return Refused("image takes more memory to decode than this server gives a picture")

    def _open(self, message: Decode) -> Opened:
        _limit_cpu(self._cpu_seconds)
        self._opened = None  # free the memory of the last picture first
        self._opened = opened = open_image(message.file.tobytes())
        return Opened(str(opened.image.format), *opened.size)

    def _pixels(self, message: Resize) -> Pixels:
        opened, self._opened = self._opened, None
        assert opened is not None
        condition, reference = resized_pixels(opened.decoded(), ReaderSizes(*message.sizes))
        return Pixels(condition, reference)


def _limit_cpu(seconds: float) -> None:
    """Limit the CPU time from now on; beyond it the kernel ends the process (SIGXCPU)."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(used.ru_utime + used.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
