"""Files of completed jobs, as they are sent to clients."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from vllm_omni.errors import InvalidRequestError, JobNotFoundError
from vllm_omni.video_jobs.encoding import OUTPUT_FORMATS
from vllm_omni.video_jobs.media import MediaNotFoundError, MediaStore
from vllm_omni.video_jobs.records import VideoJob

VARIANTS = ("video", "thumbnail", "spritesheet")
_STILLS = {"thumbnail": "image/webp", "spritesheet": "image/jpeg"}


@dataclass(frozen=True)
class MediaFile:
    """A stored file with its HTTP properties."""

    size: int
    """Bytes."""
    etag: str
    """Strong entity tag, with its quotes."""
    content_type: str
    file_name: str
    """Name under which clients may save it."""
    _key: str
    _media: MediaStore

    def read(self, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        """Bytes from `start` up to `end` (exclusive; None: the file's end), in pieces. Raises MediaStoreError."""
        return self._media.read(self._key, start, end)


async def open_content(job: VideoJob, variant: str, media: MediaStore) -> MediaFile:
    """File of a completed job. Raises InvalidRequestError for an unknown `variant`.

    Raises JobNotFoundError, whose message has the status, for a job that is not completed or was just deleted.
    """
    if variant not in VARIANTS:
        raise InvalidRequestError(f"variant takes {', '.join(VARIANTS)}, got {variant!r:.60}", param="variant")
    if job.status != "completed":
        raise JobNotFoundError(f"The video {job.id} has no content: its status is {job.status}.")
    key = job.outputs[variant]
    try:
        info = await media.info(key)
    except MediaNotFoundError as error:
        raise JobNotFoundError(f"The {variant} of {job.id} was removed.") from error
    content_type = _STILLS.get(variant) or OUTPUT_FORMATS[job.request["output_format"]].content_type
    suffix = key.rpartition(".")[2]
    name = f"{job.id}.{suffix}" if variant == "video" else f"{job.id}_{variant}.{suffix}"
    return MediaFile(info.size, info.etag, content_type, name, key, media)
