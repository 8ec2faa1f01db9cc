"""Memory for uploads, counted from the first byte of a body until its request has ended."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from vllm_omni.errors import QueueFullError
from vllm_omni.inputs.images import InputImage

MAX_UPLOAD_BYTES = 2 * 2**30
"""Room for a queue of 256 edits with a few pictures of a million pixels each, or for 20 pictures of 33 million."""


class UploadReservation(AbstractContextManager["UploadReservation"]):
    """Bytes of the upload budget that one request holds, and its pictures; leaving the context releases the bytes.

    Nothing else may refer to the pictures, so that `replace_images` frees the memory of the old ones.
    """

    def __init__(self, budget: UploadBudget) -> None:
        self._budget = budget
        self.num_bytes = 0
        self.images: tuple[InputImage, ...] = ()

    def add(self, num_bytes: int) -> None:
        """Hold `num_bytes` more. Raises QueueFullError if the budget of all requests has no room for them."""
        if self._budget.num_bytes + num_bytes > self._budget.max_bytes:
            raise QueueFullError("the pictures of other requests leave no room for this one's", retry_after=1.0)
        self.num_bytes += num_bytes
        self._budget.num_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        self.num_bytes -= num_bytes
        self._budget.num_bytes -= num_bytes

    def keep_image(self, image: InputImage) -> None:
        """Hold one more picture. Raises QueueFullError."""
        self.add(image.num_bytes)
        self.images += (image,)

    def replace_images(self, images: Iterable[InputImage]) -> None:
        """Hold `images` instead of the pictures so far. Raises QueueFullError."""
        self.release(sum(image.num_bytes for image in self.images))
        self.images = ()
        for image in images:
            self.keep_image(image)

    def transfer(self) -> UploadReservation:
        """Transfer the bytes to a new reservation, which the caller must leave."""
        other = UploadReservation(self._budget)
        other.num_bytes, self.num_bytes = self.num_bytes, 0
        return other

    def __exit__(self, *_: object) -> None:
        self.release(self.num_bytes)


class UploadBudget:
    """Bytes that the uploads of all requests hold together, at most `max_bytes`."""

    def __init__(self, max_bytes: int = MAX_UPLOAD_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0

    def reserve(self) -> UploadReservation:
        return UploadReservation(self)
