"""Rows of modulation are computed once a timestep, and forgotten when there are too many."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_omni.diffusion.compute.step.modulation import Modulation, ModulationTable, per_token

ROW_BYTES = 4 * (2 * 2 * 6 * 8 + 2 * 8)


class Rows:
    """Rows whose values tell the timestep and the place; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[float]] = []

    def __call__(self, timesteps: Sequence[float]) -> Modulation:
        self.asked.append(list(timesteps))
        t = torch.tensor(list(timesteps))
        place = torch.arange(4.0).view(2, 2, 1, 1, 1) * 100
        return Modulation((place + t.view(1, 1, -1, 1, 1)).expand(2, 2, -1, 6, 8), t.view(-1, 1, 1).expand(-1, 2, 8))


def test_rows_are_computed_once_and_given_in_order() -> None:
    rows = Rows()
    table = ModulationTable(rows, 100 * ROW_BYTES)
    table.prefetch([1.0, 2.0, 3.0, 2.0])
    assert sorted(t for asked in rows.asked for t in asked) == [1.0, 2.0, 3.0]
    got = table.rows_of([3.0, 1.0, 4.0, 3.0])
    assert rows.asked[-1] == [4.0]
    sequence = torch.tensor([0, 0, 1, 2, 3])
    for layer in (0, 1):
        for stream in (0, 1):
            parts = per_token(got.blocks[layer, stream], got.index(sequence))
            assert len(parts) == 6
            wanted = (layer * 2 + stream) * 100 + torch.tensor([3.0, 3, 1, 4, 3])
            assert torch.equal(parts[5], wanted[:, None].expand(-1, 8))
    assert table.num_bytes == 4 * ROW_BYTES


def test_a_schedule_is_computed_in_one_call_once_the_size_of_a_row_is_known() -> None:
    rows = Rows()
    table = ModulationTable(rows, 8 * ROW_BYTES)
    table.prefetch([1.0, 2.0, 3.0])
    table.prefetch([1.0, 4.0, 5.0, 6.0])
    table.prefetch([float(t) for t in range(10, 20)])
    assert rows.asked == [[1.0], [2.0, 3.0], [4.0, 5.0, 6.0]]


def test_equal_timesteps_share_one_row() -> None:
    table = ModulationTable(Rows(), 100 * ROW_BYTES)
    got = table.rows_of([2.0, 2.0, 2.0])
    index = got.index(torch.tensor([0, 1, 2]))
    assert [part.shape for part in per_token(got.blocks[0, 1], index)] == [(1, 8)] * 6
    assert [part.shape for part in got.of_output(torch.tensor([0, 1, 2]))] == [(1, 8)] * 2


def test_the_table_stays_within_its_bytes() -> None:
    rows = Rows()
    table = ModulationTable(rows, 3 * ROW_BYTES)
    table.prefetch([1.0, 2.0, 3.0, 4.0])
    assert rows.asked == [[1.0]], "a schedule that does not fit is not computed ahead"
    for t in (1.0, 2.0, 3.0):
        table.rows_of([t])
    table.rows_of([1.0])
    got = table.rows_of([4.0, 5.0, 6.0, 7.0])
    assert got.blocks.shape == (2, 2, 4, 6, 8)
    assert table.num_bytes <= 3 * ROW_BYTES


def test_a_sequence_alone_has_one_row() -> None:
    got = ModulationTable(Rows(), 100 * ROW_BYTES).rows_of([3.0, 1.0, 4.0])
    assert got.of_members([0, 2]) is got
    alone = got.of_members([2])
    (part, *_) = per_token(alone.blocks[1, 0], alone.index(torch.tensor([2, 2])))
    assert torch.equal(part, torch.full((1, 8), 204.0))
    assert alone.blocks.stride() == ModulationTable(Rows(), 100 * ROW_BYTES).rows_of([3.0]).blocks.stride()
    assert torch.equal(alone.of_members([2]).final, got.final[2:])
