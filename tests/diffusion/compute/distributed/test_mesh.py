"""Groups, mesh and ring on gloo processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.diffusion.compute.distributed.ranks import run_ranks
from vllm_omni.diffusion.compute.distributed.groups import Group, GroupBrokenError
from vllm_omni.diffusion.compute.distributed.mesh import Mesh, World, rank_groups
from vllm_omni.diffusion.compute.distributed.ring import Ring
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.errors import ConfigError


def test_axes_are_nested_with_tensor_innermost() -> None:
    parallel = DiffusionParallelConfig(
        cfg_parallel_size=2, ring_degree=2, ulysses_degree=2, tensor_parallel_size=2, vae_patch_parallel_size=4
    )
    groups = rank_groups(parallel)
    assert groups["tensor"][:2] == [[0, 1], [2, 3]]
    assert groups["ulysses"][:3] == [[0, 2], [1, 3], [4, 6]]
    assert groups["ring"][:3] == [[0, 4], [1, 5], [2, 6]]
    assert groups["sequence"][:2] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert groups["gather"] == [list(range(0, 16, 2)), list(range(1, 16, 2))]
    assert groups["vae"][1] == [4, 5, 6, 7]
    for ranks in groups.values():
        assert sorted(r for group in ranks for r in group) == list(range(16))


def test_shared_decodes_must_divide_the_replica() -> None:
    with pytest.raises(ConfigError, match=r"cfg 1 x ring 1 x ulysses 3 x tensor 1 = 3, got 2"):
        DiffusionParallelConfig(ulysses_degree=3, vae_patch_parallel_size=2)


def test_a_group_of_one_exchanges_nothing() -> None:
    group, x = Group.alone(), torch.arange(3.0)
    assert group.all_reduce(x) is x
    assert torch.equal(group.all_gather(x), x[None])
    assert Mesh.single().world.size == 1


def exchange(world: World) -> dict[str, Any]:
    group, rank = world.mesh.ulysses, world.rank
    send_sizes = [1, 2, 3]
    received = group.all_to_all(
        torch.cat([torch.full((n,), 10.0 * rank + to) for to, n in enumerate(send_sizes)]), send_sizes, [rank + 1] * 3
    )
    return {
        "reduced": group.all_reduce(torch.tensor([float(rank)])).item(),
        "gathered": group.all_gather(torch.tensor([rank])).flatten().tolist(),
        "received": received.tolist(),
        "agreed": world.mesh.control.agree(float(rank)),
        "sent": dict(world.sent),
    }


def test_exchanges_and_the_bytes_they_count() -> None:
    results = run_ranks(exchange, DiffusionParallelConfig(ulysses_degree=3))
    for rank, result in enumerate(results):
        assert result["reduced"] == 3
        assert result["gathered"] == [0, 1, 2]
        assert result["received"] == [float(10 * source + rank) for source in range(3) for _ in range(rank + 1)]
        assert result["agreed"] == 2
        assert result["sent"] == {"all_to_all": 24, "all_reduce": 4 + 8, "all_gather": 8}


def travel(world: World) -> list[list[float]]:
    ring = Ring(world.mesh.ring)
    block, seen = torch.full((world.rank, 2), float(world.rank)), []
    for step in range(ring.size):
        if step + 1 < ring.size:
            ring.post(block, ((world.rank - step - 1) % ring.size, 2))
        seen.append(block.flatten().tolist())
        if step + 1 < ring.size:
            block = ring.wait()
    return seen


def test_blocks_of_any_length_go_round_the_ring() -> None:
    for rank, seen in enumerate(run_ranks(travel, DiffusionParallelConfig(ring_degree=3))):
        assert seen == [[float(origin)] * 2 * origin for origin in ((rank - step) % 3 for step in range(3))]


def misuse(world: World) -> list[str]:
    ring = Ring(world.mesh.ring)
    errors: list[str] = []

    def post_twice() -> None:
        for _ in range(2):
            ring.post(torch.zeros(1), (1,))

    misuses: list[Callable[[], object]] = [ring.wait, post_twice]
    for wrong in misuses:
        try:
            wrong()
        except RuntimeError as error:
            errors.append(str(error))
    ring.wait()
    return errors


def test_misuse_of_the_ring_raises() -> None:
    for errors in run_ranks(misuse, DiffusionParallelConfig(ring_degree=2)):
        assert [error.split(":")[0] for error in errors] == [
            "Ring.wait was called without a post()",
            "Ring.post was called twice",
        ]
    with pytest.raises(RuntimeError, match="nobody to send to"):
        Ring(Group.alone()).post(torch.zeros(1), (1,))


def break_and_rebuild(world: World) -> tuple[str, float]:
    error = ""
    if world.rank == 1:
        world.leave()
    else:
        try:
            world.mesh.world.all_reduce(torch.ones(1))
        except GroupBrokenError as broken:
            error = type(broken).__name__
    world.rebuild()
    return error, world.mesh.tensor.all_reduce(torch.ones(1)).item() + world.mesh.world.all_reduce(torch.ones(1)).item()


def test_a_rank_that_leaves_breaks_the_others_out_of_their_exchange_and_all_meet_again() -> None:
    results = run_ranks(break_and_rebuild, DiffusionParallelConfig(ulysses_degree=2, tensor_parallel_size=2))
    assert [error for error, _ in results] == ["GroupBrokenError", "", "GroupBrokenError", "GroupBrokenError"]
    assert [total for _, total in results] == [6.0] * 4
