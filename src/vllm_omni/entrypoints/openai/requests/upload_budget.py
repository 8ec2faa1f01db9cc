"""How much memory uploads take, counted while they come and until their requests have ended."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from vllm_omni.errors import QueueFullError
from vllm_omni.inputs.images import InputImage

MAX_UPLOAD_BYTES = 2 * 2**30
"""A queue of 256 edits of a few pictures of a million pixels, or twenty pictures of 33 million."""


class UploadReservation(AbstractContextManager["UploadReservation"]):
    """Bytes of one request's upload that are in memory now, and its pictures; leaving its block gives them back.

    Nothing else refers to the pictures, for `replace_images` lets go of those that were sent.
    """

    def __init__(self, budget: UploadBudget) -> None:
        self._budget = budget
        self.num_bytes = 0
        self.images: tuple[InputImage, ...] = ()

    def add(self, num_bytes: int) -> None:
        """Raises QueueFullError where all requests together would hold too much."""
        if self._budget.num_bytes + num_bytes > self._budget.max_bytes:
            raise QueueFullError("the pictures of other requests leave no room for this one's", retry_after=1.0)
        self.num_bytes += num_bytes
        self._budget.num_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        self.num_bytes -= num_bytes
        self._budget.num_bytes -= num_bytes

    def keep_image(self, image: InputImage) -> None:
        """One picture more. Raises QueueFullError."""
        self.add(image.num_bytes)
        self.images += (image,)

    def replace_images(self, images: Iterable[InputImage]) -> None:
        """These pictures instead. Raises QueueFullError."""
        self.release(sum(image.num_bytes for image in self.images))
        self.images = ()
        for image in images:
            self.keep_image(image)

    def transfer(self) -> UploadReservation:
        """The same bytes, which are from now on not this one's to give back."""
        other = UploadReservation(self._budget)
        other.num_bytes, self.num_bytes = self.num_bytes, 0
        return other

    def __exit__(self, *_: object) -> None:
        self.release(self.num_bytes)


class UploadBudget:
    """What the uploads of all requests may hold together, from their first byte until the request has ended, so that
    memory is bounded whatever comes."""

    def __init__(self, max_bytes: int = MAX_UPLOAD_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0

    def reserve(self) -> UploadReservation:
        return UploadReservation(self)
