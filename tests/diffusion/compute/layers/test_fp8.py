"""Float8 layers against float8 written out, on one rank and on two."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.diffusion.compute.distributed.ranks import run_ranks
from tests.float8 import LARGEST, MAGNITUDES, layer_of, rounded
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.distributed.mesh import World
from vllm_omni.diffusion.compute.layers.fp8 import Fp8ColumnLinear, Fp8RowLinear, keep_in_float8
from vllm_omni.diffusion.compute.layers.linear import ColumnLinear, RowLinear
from vllm_omni.diffusion.compute.layers.rounding import quantize
from vllm_omni.diffusion.compute.weights.loading import load_weights
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.errors import ConfigError

CPU = torch.device("cpu")


def rows(seed: int = 0, count: int = 200, width: int = 96) -> Tensor:
    """Rows of magnitudes from 1e-6 to 1e6."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * torch.logspace(-6, 6, count)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_rounded_to_the_nearest_values_at_a_scale_of_their_own(dtype: torch.dtype) -> None:
    x = rows()[: 150 if dtype == torch.float16 else None].to(dtype)
    values, scale = quantize(x)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (len(x), 1))
    dequantized = values.double() * scale
    assert torch.equal(dequantized, rounded(x))
    # Half of the last of 4 bits; below the smallest normal number, half of the smallest step.
    bound = torch.maximum(x.double().abs() * 2.0**-4, scale.double() * 2.0**-10)
    assert ((dequantized - x).abs() <= bound * (1 + 1e-6)).all()
    assert torch.equal(values.float().abs().amax(-1), torch.full((len(x),), LARGEST))


@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 2.0**9])
def test_what_float8_can_say_comes_back_unchanged(scale: float) -> None:
    x = (torch.cat([MAGNITUDES, -MAGNITUDES]) * scale).float()[None]
    values, scales = quantize(x)
    assert torch.equal(values.float() * scales, x)
    assert scales.item() == scale


def test_rows_of_zeros_and_no_rows_are_rounded_as_well() -> None:
    values, scale = quantize(torch.zeros(2, 16))
    assert not values.float().any()
    assert (scale > 0).all()
    assert [tuple(t.shape) for t in quantize(torch.zeros(0, 16))] == [(0, 16), (0, 1)]
    weight, scales = quantize(torch.randn(32, 16))
    assert layer_of(weight, scales, torch.ones(32))(torch.zeros(0, 16)).shape == (0, 32)
    assert torch.equal(layer_of(weight, scales, torch.ones(32))(torch.zeros(2, 16)), torch.ones(2, 32))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_stays_in_its_row(poison: float) -> None:
    weight, scale = quantize(torch.randn(32, 16))
    x = torch.randn(5, 16)
    clean = layer_of(weight, scale, None)(x)
    x[2, 3] = poison
    got = layer_of(weight, scale, None)(x)
    assert got[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_is_that_of_the_rounded_factors(dtype: torch.dtype, has_bias: bool) -> None:
    x, matrix = rows(1)[60:140].to(dtype), rows(2, 50) * 1e-3
    bias = torch.randn(50).to(dtype) if has_bias else None
    weight, scale = quantize(matrix)
    y = layer_of(weight, scale, bias)(x)
    assert y.dtype == dtype
    product = F.linear(rounded(x), rounded(matrix))
    exact = product if bias is None else product + bias.double()
    # The product is rounded before the bias is added.
    step = 1e-5 if dtype == torch.float32 else 2.0**-8
    assert ((y.double() - exact).abs() <= step * (product.abs() + exact.abs()) + 1e-5).all()


def test_a_channel_of_small_weights_is_as_precise_as_a_large_one() -> None:
    matrix = torch.randn(2, 96) * torch.tensor([[1.0], [1e-4]])
    weight, scale = quantize(matrix)
    error = (layer_of(weight, scale, None)(torch.eye(96)).T - matrix).norm(dim=1) / matrix.norm(dim=1)
    assert (error < 0.04).all()


WIDTH, INNER = 32, 64
NAMES = {"both": ("gate", "up")}


class Network(nn.Module):
    def __init__(self, group: Group) -> None:
        super().__init__()
        self.both = ColumnLinear(WIDTH, 2 * INNER, group)
        self.down = RowLinear(INNER, WIDTH, group)
        self.out = RowLinear(INNER, WIDTH, group, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self.both(x).chunk(2, dim=-1)
        inner = torch.sigmoid(gate) * up
        return self.down(inner), self.out(inner)


def checkpoint(folder: Path) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "gate.weight": (INNER, WIDTH),
        "gate.bias": (INNER,),
        "up.weight": (INNER, WIDTH),
        "up.bias": (INNER,),
        "down.weight": (WIDTH, INNER),
        "down.bias": (WIDTH,),
        "out.weight": (WIDTH, INNER),
    }
    weights = {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return weights


def load(folder: Path, group: Group) -> Network:
    with torch.device("meta"):
        network = Network(group)
    load_weights(network, folder, NAMES, CPU, torch.float32, float8=("both", "down", "out"))
    return network


def expected(weights: dict[str, Tensor], x: Tensor, num_ranks: int) -> list[Tensor]:
    """Rows of the row layers are rounded part by part, a part a rank; biases are added once."""
    gate, up = (
        F.linear(rounded(x), rounded(weights[f"{n}.weight"]), weights[f"{n}.bias"].double()) for n in ("gate", "up")
    )
    inner = (torch.sigmoid(gate) * up).float()
    totals = []
    for name in ("down", "out"):
        parts = zip(inner.chunk(num_ranks, -1), weights[f"{name}.weight"].chunk(num_ranks, -1), strict=True)
        totals.append(sum((F.linear(rounded(a), rounded(b)) for a, b in parts), torch.zeros(())))
    return [totals[0] + weights["down.bias"], totals[1]]


def tokens() -> Tensor:
    return torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(3))


def run_shared(world: World, folder: Path) -> dict[str, Any]:
    network = load(folder, world.mesh.tensor)
    outputs = [y.tolist() for y in network(tokens())]
    held = sum(p.nbytes for p in network.parameters())
    return {"outputs": outputs, "held": held, "sent": dict(world.sent)}


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_sum_what_each_rounds_of_its_share(tmp_path: Path, size: int) -> None:
    wanted = expected(checkpoint(tmp_path), tokens(), size)
    num_weights, num_biases = 4 * WIDTH * INNER // size, 2 * INNER // size + WIDTH
    for result in run_ranks(run_shared, DiffusionParallelConfig(tensor_parallel_size=size), tmp_path):
        for got, want in zip(result["outputs"], wanted, strict=True):
            torch.testing.assert_close(torch.tensor(got), want.float(), atol=1e-5, rtol=1e-5)
        assert result["held"] == num_weights + 4 * num_biases
        assert result["sent"] == {"all_reduce": 2 * 4 * tokens().numel()}


def test_one_rank_rounds_whole_rows(tmp_path: Path) -> None:
    wanted = expected(checkpoint(tmp_path), tokens(), 1)
    for got, want in zip(load(tmp_path, Group.alone())(tokens()), wanted, strict=True):
        torch.testing.assert_close(got, want.float(), atol=1e-5, rtol=1e-5)


def test_a_graph_is_traced_whole_for_any_number_of_tokens(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    network = load(tmp_path, Group.alone()).requires_grad_(False)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network, backend=backend, fullgraph=True, dynamic=True)
    for count in (9, 4, 300):
        x = torch.randn(count, WIDTH)
        assert torch.equal(compiled(x)[0], network(x)[0])
    assert len(graphs) == 1


def test_layers_are_replaced_by_name() -> None:
    with torch.device("meta"):
        network = Network(Group((0,), 0, Counter()))
    keep_in_float8(network, ("both", "down"), CPU)
    assert [type(m) for m in network.children()] == [Fp8ColumnLinear, Fp8RowLinear, RowLinear]


def test_sizes_that_a_gpu_does_not_multiply_are_refused() -> None:
    with torch.device("meta"):
        network = nn.ModuleDict({"a": ColumnLinear(32, 24, Group.alone()), "b": RowLinear(40, 32, Group.alone())})
    for name, sizes in (("a", "24 x 32"), ("b", "32 x 40")):
        with pytest.raises(ConfigError, match=rf"fp8 takes .* multiples of 16 on a GPU, got {sizes} \({name}\)"):
            keep_in_float8(network, (name,), torch.device("cuda"))
    keep_in_float8(network, ("a", "b"), CPU)
