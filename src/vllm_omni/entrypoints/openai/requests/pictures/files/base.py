"""Result and errors of the readers of picture files."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.images import check_num_pixels

UPRIGHT = 1
"""EXIF's orientation of a picture that is stored as it is shown."""


@dataclass(frozen=True)
class PictureFile:
    """A picture file without the parts that do not change its pixels."""

    format: str
    """Pillow's name of the format."""
    data: bytes
    orientation: int = UPRIGHT
    """EXIF's orientation; a value that is not 1 to 8 means upright."""


def broken(kind: str) -> InvalidRequestError:
    return InvalidRequestError(f"image is a broken {kind} file", param="image")


def check_size(kind: str, width: int, height: int) -> None:
    """Raises InvalidRequestError for a declared size that no picture has or that is too large."""
    if width < 1 or height < 1:
        raise broken(kind)
    check_num_pixels(width, height)


def check_count(kind: str, count: int, most: int, things: str) -> None:
    """Raises InvalidRequestError for a file with more than `most` parts of a kind."""
    if count > most:
        raise InvalidRequestError(f"image takes {kind} files with at most {most} {things}", param="image")
