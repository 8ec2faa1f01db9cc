"""Streams of weights: what is copied when, skipped units, errors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from tests.diffusion.compute.offload.checked_copies import CheckedCopies, CopiesWithoutWaiting
from vllm_omni.diffusion.compute.device.flat_weights import FlatWeights
from vllm_omni.diffusion.compute.device.host_runs import host_run
from vllm_omni.diffusion.compute.offload.layer_offload import spread
from vllm_omni.diffusion.compute.offload.weight_stream import NUM_SLOTS, Unit, WeightStream, bytes_of_slots

CPU = torch.device("cpu")
X = torch.ones(2, 4)


def streamed(count: int, copies: CheckedCopies) -> tuple[list[nn.Linear], list[Tensor], WeightStream]:
    """Layers whose weights stream, the outputs that they must have, and the stream."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4).requires_grad_(False) for _ in range(count)]
    wanted = [layer(X) for layer in layers]
    units = []
    for layer in layers:
        weights = FlatWeights([layer])
        run = host_run(weights.num_bytes, CPU)
        weights.save(run)
        units.append(Unit(layer, weights, run))
    assert bytes_of_slots(units) == min(NUM_SLOTS, count) * units[0].weights.num_bytes
    return layers, wanted, WeightStream(units, copies)


def run(layers: Sequence[nn.Linear], wanted: Sequence[Tensor], which: Sequence[int]) -> None:
    for number in which:
        torch.testing.assert_close(layers[number](X), wanted[number], rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
def test_a_pass_copies_every_unit_once_and_begins_the_next_pass(count: int) -> None:
    copies = CheckedCopies()
    layers, wanted, _ = streamed(count, copies)
    run(layers, wanted, range(count))
    first = len(copies.copied_bytes)
    run(layers, wanted, range(count))
    run(layers, wanted, range(count))
    of_slots = [len(range(slot, count, NUM_SLOTS)) for slot in range(NUM_SLOTS)]
    a_pass = sum(its for its in of_slots if its > 1)  # one unit alone stays in its slot
    assert (len(copies.copied_bytes) - first) == 2 * a_pass
    assert first <= count + NUM_SLOTS
    assert copies.slot_bytes == min(NUM_SLOTS, count) * 512  # weight and bias, each aligned


def test_a_unit_is_copied_before_it_runs() -> None:
    copies = CheckedCopies()
    layers, wanted, _ = streamed(6, copies)
    started: list[int] = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: started.append(len(copies.copied_bytes)))
    run(layers, wanted, range(6))
    # While unit n computes, the copy of unit n + 1 is under way, and the one after it begins when n has run.
    assert started == [2 + 1, *range(4, 9)]


def test_skipped_units_are_not_copied_once_the_skipping_is_known() -> None:
    copies = CheckedCopies()
    layers, wanted, _ = streamed(10, copies)
    run(layers, wanted, range(10))
    for _ in range(3):
        run(layers, wanted, [0, 9])
    before = len(copies.copied_bytes)
    for _ in range(5):
        run(layers, wanted, [0, 9])
    assert len(copies.copied_bytes) == before  # both stay in their slots


def test_any_order_gives_the_right_weights() -> None:
    dice = random.Random(3)
    layers, wanted, _ = streamed(7, CheckedCopies())
    run(layers, wanted, [dice.randrange(7) for _ in range(300)])


def test_after_an_error_the_next_pass_has_the_right_weights() -> None:
    layers, wanted, _ = streamed(5, CheckedCopies())
    for number in (0, 1, 4, 2, 3):
        run(layers, wanted, range(number))
        with pytest.raises(RuntimeError, match="shapes"):
            layers[number](torch.ones(2, 3))
        run(layers, wanted, range(5))


def test_a_copy_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = CheckedCopies()
    layers, wanted, _ = streamed(5, copies)
    run(layers, wanted, range(2))
    with monkeypatch.context() as patch:
        patch.setattr(copies, "copy", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            run(layers, wanted, range(2, 5))
    run(layers, wanted, range(5))


def test_without_waiting_the_weights_are_no_numbers() -> None:
    layers, _, _ = streamed(3, CopiesWithoutWaiting())
    assert layers[0](X).isnan().all()


def test_a_copy_into_a_slot_in_use_is_seen() -> None:
    copies = CheckedCopies()
    slot = copies.slot(8)
    copies.wait(copies.copy(torch.zeros(8, dtype=torch.uint8), slot))
    with pytest.raises(AssertionError, match="may still be read"):
        copies.copy(torch.zeros(8, dtype=torch.uint8), slot)


def test_a_paused_stream_copies_nothing_and_goes_on_afterwards() -> None:
    copies = CheckedCopies()
    layers, wanted, stream = streamed(6, copies)
    run(layers, wanted, range(3))
    before = len(copies.copied_bytes)
    with stream.paused():
        for layer in layers:
            layer(X)
    assert len(copies.copied_bytes) == before
    run(layers, wanted, range(6))
    stream.copy_all()
    run(layers, wanted, range(6))


@pytest.mark.parametrize(
    ("count", "total", "numbers"),
    [(0, 5, set()), (2, 6, {2, 5}), (3, 5, {1, 3, 4}), (5, 5, {0, 1, 2, 3, 4}), (9, 3, {0, 1, 2}), (1, 0, set())],
)
def test_resident_layers_are_spread(count: int, total: int, numbers: set[int]) -> None:
    assert spread(count, total) == numbers
