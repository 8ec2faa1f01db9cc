"""Layers shared by ranks against the whole ones, filled from a checkpoint of which each rank reads its share."""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.diffusion.compute.distributed.ranks import run_ranks
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.distributed.mesh import World
from vllm_omni.diffusion.compute.layers.linear import (
    ColumnEmbedding,
    ColumnLinear,
    Float32Linear,
    KeepsFloat32,
    RowLinear,
    Sharded,
)
from vllm_omni.diffusion.compute.weights.loading import load_weights
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.errors import ConfigError

WIDTH, INNER, ENTRIES = 12, 24, 7
NAMES = {"both": ("gate", "up")}
"""Two checkpoint modules in one of ours, each of which is cut on its own."""


class Network(nn.Module):
    """embed -> gate and up -> down, as in a transformer's MLP."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.embed = ColumnEmbedding(ENTRIES, WIDTH, group)
        self.both = ColumnLinear(WIDTH, 2 * INNER, group)
        self.down = RowLinear(INNER, WIDTH, group)
        self.head = RowLinear(INNER, 2, group, bias=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self.both(self.norm(self.embed(ids))).chunk(2, dim=-1)
        inner = torch.sigmoid(gate) * up
        return self.down(inner), self.head(inner)


def checkpoint(folder: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {
        "embed.weight": (ENTRIES, WIDTH),
        "gate.weight": (INNER, WIDTH),
        "gate.bias": (INNER,),
        "up.weight": (INNER, WIDTH),
        "up.bias": (INNER,),
        "down.weight": (WIDTH, INNER),
        "down.bias": (WIDTH,),
        "head.weight": (2, INNER),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    weights = {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return weights


def load(folder: Path, group: Group, counted: list[int]) -> Network:
    with torch.device("meta"):
        network = Network(group)
    load_weights(network, folder, NAMES, torch.device("cpu"), torch.float32, counted.append)
    return network


def whole(weights: dict[str, Tensor], ids: Tensor) -> tuple[Tensor, Tensor]:
    functional = nn.functional
    x = functional.layer_norm(weights["embed.weight"][ids], (WIDTH,), weights["norm.weight"], weights["norm.bias"])
    gate, up = (functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in ("gate", "up"))
    inner = torch.sigmoid(gate) * up
    down = functional.linear(inner, weights["down.weight"], weights["down.bias"])
    return down, functional.linear(inner, weights["head.weight"])


IDS = torch.tensor([[1, 0, 6], [3, 3, 2]])


def run_shared(world: World, folder: Path) -> dict[str, Any]:
    counted: list[int] = []
    network = load(folder, world.mesh.tensor, counted)
    down, head = network(IDS)
    held = sum(parameter.nbytes for parameter in network.parameters())
    return {"down": down.tolist(), "head": head.tolist(), "read": sum(counted), "held": held, "sent": dict(world.sent)}


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_share_layers_compute_what_whole_layers_compute(tmp_path: Path, size: int) -> None:
    weights = checkpoint(tmp_path)
    whole_names = ("down.bias", "norm.weight", "norm.bias")
    kept_whole = sum(weights[name].nbytes for name in whole_names)
    shared = sum(tensor.nbytes for name, tensor in weights.items() if name not in whole_names)
    down, head = whole(weights, IDS)
    for result in run_ranks(run_shared, DiffusionParallelConfig(tensor_parallel_size=size), tmp_path):
        assert (torch.tensor(result["down"]) - down).abs().max() < 1e-5
        assert (torch.tensor(result["head"]) - head).abs().max() < 1e-5
        assert result["read"] == result["held"] == kept_whole + shared // size
        tokens = IDS.numel() * 4
        assert result["sent"] == {"all_gather": tokens * WIDTH // size, "all_reduce": tokens * (WIDTH + 2)}


def test_a_group_of_one_holds_everything_and_asks_nobody(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path)
    counted: list[int] = []
    network = load(tmp_path, Group.alone(), counted)
    for ours, wanted in zip(network(IDS), whole(weights, IDS), strict=True):
        assert (ours - wanted).abs().max() < 1e-6
    assert sum(counted) == sum(tensor.nbytes for tensor in weights.values())


def refused_shape(world: World, folder: Path) -> str:
    try:
        load(folder, world.mesh.tensor, [])
    except ConfigError as error:
        return str(error)
    return ""


def test_a_weight_of_another_shape_is_refused_with_the_whole_shapes(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path) | {"down.weight": torch.zeros(WIDTH, INNER // 2)}
    save_file(weights, tmp_path / "model.safetensors")
    for error in run_ranks(refused_shape, DiffusionParallelConfig(tensor_parallel_size=2), tmp_path):
        assert error.endswith("down.weight has shape (12, 12), expected (12, 24)")


def test_features_that_ranks_cannot_share_are_refused() -> None:
    group = Group((0, 1, 2), 0, Counter())
    with pytest.raises(ValueError, match="out_features must be a multiple of the group's 3 ranks, got 4"):
        ColumnLinear(3, 4, group)
    with pytest.raises(ValueError, match="in_features must be a multiple of the group's 3 ranks, got 4"):
        RowLinear(4, 3, group)
    with pytest.raises(ValueError, match="embedding_dim must be a multiple of the group's 3 ranks, got 4"):
        ColumnEmbedding(3, 4, group)


def test_checks_of_layers_need_no_attribute_lookup_by_the_module() -> None:
    """Python 3.12 looks up a protocol's members statically, which does not find parameters."""
    group = Group.alone()
    checks: list[tuple[nn.Module, type]] = [
        (ColumnLinear(2, 3, group), Sharded),
        (RowLinear(2, 3, group), Sharded),
        (ColumnEmbedding(2, 3, group), Sharded),
        (Float32Linear(2, 3), KeepsFloat32),
    ]
    for layer, protocol in checks:
        assert isinstance(layer, protocol)
        for member in protocol.__annotations__:
            inspect.getattr_static(layer, member)
