"""Result and checks that the readers of all formats share."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.images import check_num_pixels

UPRIGHT = 1
"""EXIF's orientation of a picture whose rows are stored from top to bottom."""


@dataclass(frozen=True)
class PictureFile:
    """A picture file reduced to the parts that determine its pixels."""

    format: str
    """Pillow's name of the format."""
    data: bytes
    orientation: int = UPRIGHT
    """EXIF's orientation, 1 to 8; any other value means upright."""


def broken(kind: str) -> InvalidRequestError:
    return InvalidRequestError(f"image is a broken {kind} file", param="image")


def check_size(kind: str, width: int, height: int) -> None:
    """Raise InvalidRequestError for a declared size that is not positive or too large."""
    if width < 1 or height < 1:
        raise broken(kind)
    check_num_pixels(width, height)


def check_count(kind: str, count: int, most: int, things: str) -> None:
    """Raise InvalidRequestError for a file with more than `most` parts, which are `things`."""
    if count > most:
        raise InvalidRequestError(f"image takes {kind} files with at most {most} {things}", param="image")
