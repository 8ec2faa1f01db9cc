"""Writer of video files that takes frames as they come: MP4 with H.264, WebM with VP9, or GIF."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.stream import VideoStream

MAX_SIDE = 16384
"""Longest side, in pixels, of the encoders' pictures."""


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
    max_fps: int = 1000
    """Largest frame rate that players show."""


OUTPUT_FORMATS: Mapping[str, VideoFileFormat] = {
    video_format.name: video_format
    for video_format in (
        # Constant quality, whose differences are hardly visible; the index in front: it plays while it is loaded.
        VideoFileFormat("mp4", "video/mp4", "libx264", {"crf": "18", "preset": "medium"}, {"movflags": "+faststart"}),
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
        is_yuv = video_format.pixel_format == "yuv420p"
        self._padding = (height % 2, width % 2) if is_yuv else (0, 0)
        self._time_base = 1 / rate
        self._num_written = 0
        self._container = av.open(
            os.fspath(path), "w", format=video_format.name, container_options=dict(video_format.container_options)
        )
        try:
            stream = self._container.add_stream(video_format.codec, rate=rate, options=dict(video_format.options))
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width = height + self._padding[0], width + self._padding[1]
            stream.pix_fmt = video_format.pixel_format
            stream.codec_context.thread_count = num_threads
            self._stream = stream
            self._convert = _YuvFrames(stream) if is_yuv else _PaletteFrames(stream, self._time_base)
        except BaseException:
            self._container.close()
            raise

    def write(self, picture: np.ndarray) -> None:
        """Append one frame: uint8 [height, width, 3]."""
        import av

        assert picture.shape == (*self._size, 3), (picture.shape, self._size)
        below, right = self._padding
        if below or right:
            picture = np.pad(picture, ((0, below), (0, right), (0, 0)), "edge")
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = self._num_written, self._time_base
        self._num_written += 1
        self._encode(self._convert(frame))

    def finish(self) -> None:
        """Write the frames that the encoder still holds and the file's index, and close the file."""
        try:
            self._encode(self._convert(None))
            self._container.mux(self._stream.encode(None))
        finally:
            self.close()

    def close(self) -> None:
        """Close the file; without `finish` it is not valid."""
        self._container.close()

    def _encode(self, frames: Iterable[VideoFrame]) -> None:
        for frame in frames:
            self._container.mux(self._stream.encode(frame))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.finish()
        else:
            self.close()


class _YuvFrames:
    """Conversion of rgb24 frames to yuv420p in the colour space of HD video (BT.709)."""

    def __init__(self, stream: VideoStream) -> None:
        from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        self._target: Any = {
            "format": "yuv420p",
            "dst_colorspace": Colorspace.ITU709,
            "dst_color_range": ColorRange.MPEG,
        }

    def __call__(self, frame: VideoFrame | None) -> Iterator[VideoFrame]:
        """Converted frames that are ready; None: there is no further frame."""
        if frame is not None:
            converted = frame.reformat(**self._target)
            converted.pts, converted.time_base = frame.pts, frame.time_base
            yield converted


class _PaletteFrames:
    """Conversion of rgb24 frames to 256 colours, which are chosen for each frame: no later frame has to be known."""

    def __init__(self, stream: VideoStream, time_base: Fraction) -> None:
        from av import VideoFormat
        from av.filter import Graph

        graph = self._graph = Graph()
        rgb = VideoFormat("rgb24", stream.width, stream.height)
        source = graph.add_buffer(width=rgb.width, height=rgb.height, format=rgb, time_base=time_base)
        split, sink = graph.add("split"), graph.add("buffersink")
        palette = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
        # An ordered pattern stays where it is from frame to frame; one of error diffusion would flicker.
        use = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=4")
        source.link_to(split)
        split.link_to(use, 0, 0)
        split.link_to(palette, 1, 0)
        palette.link_to(use, 0, 1)
        use.link_to(sink)
        graph.configure()

    def __call__(self, frame: VideoFrame | None) -> Iterator[VideoFrame]:
        """Converted frames that are ready; None: there is no further frame."""
        from av.error import BlockingIOError, EOFError

        self._graph.vpush(frame)
        while True:
            try:
                yield self._graph.vpull()
            except (BlockingIOError, EOFError):  # no further frame now, or at all
                return
