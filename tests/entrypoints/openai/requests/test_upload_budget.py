"""The upload budget: exact, and released when a request ends."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_omni.entrypoints.openai.requests.body_reader import UploadBudget
from vllm_omni.errors import QueueFullError
from vllm_omni.inputs.images import InputImage


def make_image(side: int) -> InputImage:
    """A picture of 3 * side² bytes."""
    pixels = np.zeros((side, side, 3), np.uint8)
    return InputImage.of(pixels, pixels)


def test_the_budget_is_taken_to_the_last_byte_and_given_back() -> None:
    budget = UploadBudget(max_bytes=100)
    with budget.reserve() as one, budget.reserve() as other:
        one.add(60)
        other.add(40)
        with pytest.raises(QueueFullError) as full:
            other.add(1)
        assert full.value.retry_after == 1.0
        assert (one.num_bytes, other.num_bytes, budget.num_bytes) == (60, 40, 100)
        one.release(10)
        other.add(10)
    assert budget.num_bytes == 0


def test_pictures_are_replaced_and_not_counted_twice() -> None:
    budget = UploadBudget(max_bytes=500)
    with budget.reserve() as reservation:
        reservation.add(100)
        for _ in range(2):
            reservation.keep_image(make_image(8))
        small = make_image(2)
        reservation.replace_images([small])
        assert reservation.images == (small,)
        assert (reservation.num_bytes, budget.num_bytes) == (112, 112)
    assert budget.num_bytes == 0


def test_transferred_bytes_are_released_once_by_the_new_reservation() -> None:
    budget = UploadBudget()
    with budget.reserve() as reservation:
        reservation.add(100)
        transferred = reservation.transfer()
    assert budget.num_bytes == 100
    with transferred:
        pass
    assert budget.num_bytes == 0
