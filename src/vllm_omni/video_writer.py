"""Writer of video files that takes frames as they come: MP4 with H.264, WebM with VP9, or GIF."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.stream import VideoStream

MIN_FPS, MAX_FPS = 0.01, 1000
MAX_SIDE = 16384
"""Longest side, in pixels, of the encoders' pictures."""
_SAMPLE_PIXELS = 40_000
"""Pixels of a frame from which the colours of a GIF are chosen."""


@dataclass(frozen=True)
class VideoFileFormat:
    """A kind of video file: its container, encoder and limits."""

    name: str
    """Name of the container in FFmpeg, and suffix of the file."""
    content_type: str
    codec: str
    options: Mapping[str, str]
    """Settings of the encoder."""
    container_options: Mapping[str, str] = field(default_factory=dict)
    pixel_format: str = "yuv420p"
    max_fps: int = MAX_FPS
    """Largest frame rate that players show."""


OUTPUT_FORMATS: Mapping[str, VideoFileFormat] = {
    video_format.name: video_format
    for video_format in (
        # Constant quality, whose differences are hardly visible; the index in front: it plays while it is loaded.
        # Without macroblock trees the same frames are the same file: x264's vector code for trees reads what lies
        # behind a row of macroblocks, so the file would differ from run to run unless 128 divides the width.
        VideoFileFormat(
            "mp4",
            "video/mp4",
            "libx264",
            {"crf": "18", "preset": "medium", "x264-params": "mbtree=0"},
            {"movflags": "+faststart"},
        ),
        # libvpx's default ("good", cpu-used 1) is ten times slower than x264; "realtime" is about as fast.
        VideoFileFormat(
            "webm", "video/webm", "libvpx-vp9", {"crf": "24", "deadline": "realtime", "cpu-used": "6", "row-mt": "1"}
        ),
        # GIF counts hundredths of a second, and browsers slow down frames that are shown for less than two.
        VideoFileFormat("gif", "image/gif", "gif", {}, {"loop": "0"}, pixel_format="pal8", max_fps=50),
    )
}
"""Formats of video files by name."""


class VideoFileWriter:
    """A video file that is being written; leaving its `with` block finishes the file.

    Methods block, and raise OSError (FFmpeg's own too) when the file cannot be written. They may run in several
    threads, one at a time. A file that is not finished is not valid; the caller removes it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        video_format: VideoFileFormat,
        rate: Fraction,
        height: int,
        width: int,
        num_threads: int = 0,
    ) -> None:
        """Open `path` for frames of `height` x `width` pixels.

        rate: frames a second; num_threads: threads of the encoder, 0 lets FFmpeg choose. A side with an odd number of
        pixels gets one more, a copy of its edge, because yuv420p stores colours for 2x2 pixels; a GIF keeps its size.
        """
        import av  # takes a fifth of a second, which a server without videos need not spend

        self._size = (height, width)
        self._time_base = 1 / rate
        self._num_written = 0
        self._container = av.open(
            os.fspath(path), "w", format=video_format.name, container_options=dict(video_format.container_options)
        )
        try:
            stream = self._container.add_stream(video_format.codec, rate=rate, options=dict(video_format.options))
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width, stream.pix_fmt = height, width, video_format.pixel_format
            stream.codec_context.thread_count = num_threads
            self._stream = stream
            self._convert: Callable[[np.ndarray], VideoFrame] = _palette_frame
            if video_format.pixel_format == "yuv420p":
                stream.height, stream.width = height + height % 2, width + width % 2
                self._convert = _yuv_conversion(stream)
        except BaseException:
            self._container.close()
            raise

    def write(self, picture: np.ndarray) -> None:
        """Append one frame: uint8 [height, width, 3]."""
        assert picture.shape == (*self._size, 3), (picture.shape, self._size)
        frame = self._convert(picture)
        frame.pts, frame.time_base = self._num_written, self._time_base
        self._num_written += 1
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Write the frames that the encoder still holds and the file's index, and close the file."""
        try:
            self._container.mux(self._stream.encode(None))
        finally:
            self.close()

    def close(self) -> None:
        """Close the file; without `finish` it is not valid."""
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.finish()
        else:
            self.close()


def _yuv_conversion(stream: VideoStream) -> Callable[[np.ndarray], VideoFrame]:
    """Conversion to yuv420p in the colour space of HD video (BT.709), which is noted in the file."""
    from av import VideoFrame
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    context = stream.codec_context
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709

    def convert(picture: np.ndarray) -> VideoFrame:
        height, width, _ = picture.shape
        if height % 2 or width % 2:
            picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
        return VideoFrame.from_ndarray(picture, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )

    return convert


def _palette_frame(picture: np.ndarray) -> VideoFrame:
    """A frame of 256 colours, which are chosen for it alone: no later frame has to be known.

    Pillow chooses them, because FFmpeg's filter takes seconds for a frame of 1280x720.
    """
    from av import VideoFrame

    height, width, _ = picture.shape
    apart = max(1, round(math.sqrt(height * width / _SAMPLE_PIXELS)))
    sample = Image.fromarray(np.ascontiguousarray(picture[::apart, ::apart]))
    colours = sample.quantize(256, Image.Quantize.MEDIANCUT)
    indices = Image.fromarray(picture).quantize(palette=colours, dither=Image.Dither.FLOYDSTEINBERG)
    palette = np.zeros((256, 4), np.uint8)  # alpha, red, green, blue
    palette[:, 0] = 255
    chosen = np.reshape(colours.getpalette(), (-1, 3))
    palette[: len(chosen), 1:] = chosen
    # PyAV's types lack the pair that pal8 takes.
    return VideoFrame.from_ndarray((np.asarray(indices), palette), format="pal8")  # type: ignore[arg-type]
