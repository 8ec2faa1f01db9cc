"""Layers with compressed weights against plain layers with the expanded ones, on one rank and on two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.diffusion.compute.distributed.ranks import run_ranks
from vllm_omni.diffusion.compute.device.flat_weights import FlatWeights
from vllm_omni.diffusion.compute.device.host_runs import host_run
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.distributed.mesh import World
from vllm_omni.diffusion.compute.layers.compressed import (
    CompressedColumnLinear,
    CompressedEmbedding,
    CompressedRowLinear,
    ScaledRows,
    compress,
    group_length,
)
from vllm_omni.diffusion.compute.layers.linear import ColumnEmbedding, ColumnLinear, RowLinear
from vllm_omni.diffusion.compute.layers.low_rank import AdaptedLayer, LayerWeights, RowRange, UpWeight, torch_changes
from vllm_omni.diffusion.compute.layers.rounding import FLOAT8
from vllm_omni.diffusion.compute.weights.loading import load_weights
from vllm_omni.diffusion.data import DiffusionParallelConfig

CPU = torch.device("cpu")
DTYPES = [torch.int8, FLOAT8]
WIDTH, INNER, ENTRIES = 64, 96, 11
STEPS = {torch.int8: 1 / 254, FLOAT8: 2.0**-4}
"""Largest rounding error, as part of a group's largest magnitude."""


def scaled_rows(matrix: Tensor, dtype: torch.dtype) -> ScaledRows:
    rows = ScaledRows(dtype, *matrix.shape)
    rows.values, rows.scales = rows.rounding(matrix)
    return rows


def expanded(rows: ScaledRows, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(rows.num_rows, rows.num_columns, dtype=dtype)
    rows.expand(out)
    return out


@pytest.mark.parametrize(("columns", "length"), [(3584, 128), (96, 32), (40, 40), (7, 7), (16, 16), (8, 8)])
def test_a_scale_is_for_a_group_of_a_row(columns: int, length: int) -> None:
    assert group_length(columns) == length
    assert scaled_rows(torch.zeros(2, columns), torch.int8).scales.shape == (2, columns // length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [256, 40])
def test_numbers_are_rounded_within_their_group(dtype: torch.dtype, columns: int) -> None:
    matrix = torch.randn(60, columns, generator=torch.Generator().manual_seed(0))
    matrix = matrix * torch.logspace(-6, 6, 60)[:, None]
    matrix[:, 0] *= 1000  # numbers of other groups do not become coarser
    matrix[3] = 0
    rows = scaled_rows(matrix, dtype)
    assert rows.values.dtype == dtype
    grouped = matrix.unflatten(1, (-1, group_length(columns)))
    largest = grouped.abs().amax(-1, keepdim=True).expand_as(grouped).flatten(1)
    error = (expanded(rows) - matrix).abs()
    assert (error <= STEPS[dtype] * largest * (1 + 1e-5)).all()
    assert torch.equal(expanded(rows)[3], torch.zeros(columns))
    assert torch.equal(expanded(rows, torch.bfloat16), expanded(rows).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_entries_that_are_looked_up_are_expanded(dtype: torch.dtype) -> None:
    matrix = torch.randn(ENTRIES, WIDTH)
    rows = scaled_rows(matrix, dtype)
    with torch.device("meta"):
        embedding = CompressedEmbedding(ColumnEmbedding(ENTRIES, WIDTH, Group.alone()).bfloat16(), rows)
    numbers = torch.tensor([[3, 0], [3, 10]])
    assert torch.equal(embedding(numbers), expanded(rows, torch.bfloat16)[numbers])


class Network(nn.Module):
    def __init__(self, group: Group) -> None:
        super().__init__()
        self.embed = ColumnEmbedding(ENTRIES, WIDTH, group)
        self.up = ColumnLinear(WIDTH, INNER, group)
        self.down = RowLinear(INNER, WIDTH, group)
        self.head = RowLinear(INNER, 3, group, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        inner = torch.sigmoid(self.up(self.embed(ids)))
        return self.down(inner), self.head(inner)


def load(folder: Any, group: Group, dtype: torch.dtype | None) -> Network:
    with torch.device("meta"):
        network = Network(group)
    load_weights(network, folder, {}, CPU, torch.float32, row_dtype=dtype)
    return network


def save(folder: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(Network(Group.alone()).state_dict(), folder / "model.safetensors")


IDS = torch.tensor([[1, 0, 6], [3, 3, 2]])


def run(world: World, folder: Any, dtype: torch.dtype) -> dict[str, Any]:
    network = load(folder, world.mesh.tensor, dtype)
    held = sum(buffer.nbytes for buffer in network.buffers())
    return {"outputs": [y.tolist() for y in network(IDS)], "held": held, "sent": dict(world.sent)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2])
def test_layers_in_scaled_rows_compute_nearly_the_same(tmp_path: Any, dtype: torch.dtype, size: int) -> None:
    save(tmp_path)
    wanted = load(tmp_path, Group.alone(), None)(IDS)
    for result in run_ranks(run, DiffusionParallelConfig(tensor_parallel_size=size), tmp_path, dtype):
        for got, want in zip(result["outputs"], wanted, strict=True):
            error = (torch.tensor(got) - want).norm() / want.norm()
            assert 0 < error < (0.01 if dtype == torch.int8 else 0.06)
        numbers = ENTRIES * WIDTH + (2 * WIDTH + 3) * INNER
        assert numbers // size < result["held"] < 1.3 * numbers / size
        if size > 1:  # no other exchanges than those of plain layers
            tokens = IDS.numel() * 4
            assert result["sent"] == {"all_gather": tokens * WIDTH // size, "all_reduce": tokens * (WIDTH + 3)}


def test_each_layer_is_kept_in_its_form_and_no_weight_twice(tmp_path: Any) -> None:
    save(tmp_path)
    network = load(tmp_path, Group.alone(), torch.int8)
    layers = [type(layer) for layer in network.children()]
    assert layers == [CompressedEmbedding, CompressedColumnLinear, CompressedRowLinear, CompressedRowLinear]
    assert sorted(name for name, _ in network.named_parameters()) == ["down.bias", "up.bias"]
    flat = FlatWeights([network])
    want = [y.clone() for y in network(IDS)]
    moved = host_run(flat.num_bytes, CPU)
    flat.save(moved)
    flat.attach(moved)
    assert all(torch.equal(a, b) for a, b in zip(network(IDS), want, strict=True))


@pytest.mark.parametrize("cls", [ColumnLinear, RowLinear])
def test_adapters_change_a_compressed_layer_as_a_plain_one(cls: Any) -> None:
    plain = cls(WIDTH, INNER, Group.alone()).requires_grad_(False)
    rows = [scaled_rows(part, torch.int8) for part in plain.weight.split([64, 32])]
    layer = compress(plain, rows)
    plain.weight.copy_(torch.cat([expanded(part) for part in rows]))
    assert (layer.weight.shape, layer.weight.dtype) == (plain.weight.shape, plain.weight.dtype)
    x = torch.randn(5, WIDTH)
    assert torch.equal(layer(x), plain(x))
    weights = LayerWeights(torch.randn(2, WIDTH), (UpWeight(slice(0, INNER), slice(0, 2), torch.randn(INNER, 2)),))
    adapted = AdaptedLayer([(weights, (RowRange(1, 4, 0.5),))], 5, INNER)
    (layer.change,) = (plain.change,) = torch_changes([adapted], CPU)
    assert torch.equal(layer(x), plain(x))
    layer.change = None
    assert not torch.equal(layer(x), plain(x))
