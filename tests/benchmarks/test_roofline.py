"""FLOPs and bytes that the roofline counts equal those of the packed transformers, rank by rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.published import TRANSFORMERS
from benchmarks.roofline.__main__ import main
from benchmarks.roofline.cards import CARDS, floor_of
from benchmarks.roofline.costs import (
    Branch,
    QwenImage,
    StepCost,
    computed_blocks,
    rank_cost,
    sequences_of,
    transformer_of,
)
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from testbed.runner_driver import make_request
from testbed.tiny_models import build_tiny_qwen_image
from testbed.tiny_wan import build_tiny_wan
from testbed.tiny_z_image import build_tiny_z_image
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.worker.replica import started
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.placement import balance
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.diffusion.messages.worker import RankInfo

pytestmark = pytest.mark.thorough

BUILDERS: dict[str, Callable[..., Path]] = {"qwen_image": build_tiny_qwen_image, "z_image": build_tiny_z_image}
REQUESTS = [
    make_request("a", "a red apple and a blue car", negative_prompt="", height=96, width=80),
    make_request("b", "a blue car", height=48, width=64),
]
LAYOUTS: list[dict[str, int]] = [
    {},
    {"ulysses_degree": 3},
    {"ring_degree": 2},
    {"ulysses_degree": 2, "ring_degree": 2},
    {"cfg_parallel_size": 2},
    {"tensor_parallel_size": 2, "ulysses_degree": 2},
]
VIDEOS = [replace(request, num_frames=num_frames) for request, num_frames in zip(REQUESTS, (5, 9))]


def sdpa_of_cpu(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    count: int = sdpa_flop_count(query, key, value)
    return count


def measure(
    place: RankInfo,
    parallel: DiffusionParallelConfig,
    path: Path,
    settings: Mapping[str, Any],
    steps: int,
    requests: Sequence[DiffusionRequest] = REQUESTS,
) -> tuple[dict[str, float], dict[str, int], list[list[Branch]]]:
    """FLOPs by operation and bytes by exchange that the last step takes on this rank, and its sequences by request."""
    runner = started(place, parallel, path, **settings)
    pipeline: Any = runner.pipeline
    with torch.no_grad():
        states = [pipeline.encode(request) for request in requests]
        placed = balance({s.request.request_id: s.sequence_lengths for s in states}, parallel.cfg_parallel_size)
        groups = [group for groups in placed.values() for group in groups]
        pipeline.predict(states, groups)  # lays out
        for _ in range(steps):
            runner.ranks.take_sent_bytes()
            mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_of_cpu}
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
                pipeline.predict(states, groups)
            for state in states:
                state.settle()
                state.step += 1
    flops = {str(op).removeprefix("aten."): float(n) for op, n in counter.get_flop_counts()["Global"].items()}
    sequences = [
        [
            Branch(
                len(text), state.num_tokens if hasattr(state, "num_tokens") else state.grids[0][0] * state.grids[0][1]
            )
            for text in state.text
        ]
        for state in states
    ]
    return flops, dict(runner.ranks.take_sent_bytes()), sequences


def model_of(path: Path) -> Any:
    return transformer_of(json.loads((path / "transformer" / "config.json").read_text()))


@pytest.fixture(scope="module", params=BUILDERS)
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BUILDERS[request.param](tmp_path_factory.mktemp("roofline") / request.param, heads=6)


def check(cost: StepCost, flops: Mapping[str, float]) -> None:
    attention = sum(n for op, n in flops.items() if "attention" in op)
    assert cost.attention_flops == attention > 0
    assert cost.gemm_flops == sum(flops.values()) - attention


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(layout) or "one")
def test_flops_and_exchanges_are_those_of_the_transformer(model_path: Path, layout: dict[str, int]) -> None:
    parallel = DiffusionParallelConfig(**layout)
    measured = run_places(measure, parallel, parallel, model_path, {"dtype": "bfloat16"}, 1)
    for rank, (flops, sent, sequences) in enumerate(measured):
        cost = rank_cost(model_of(model_path), sequences, parallel, rank)
        check(cost, flops)
        assert cost.exchanges == {kind: count for kind, count in sent.items() if count}, rank


def check_videos(path: Path, layout: Mapping[str, int]) -> None:
    """Compare every rank of a step with two videos of the tiny Wan model that is written to `path`."""
    build_tiny_wan(path, heads=6)
    parallel, model = DiffusionParallelConfig(**layout), model_of(path)
    measured = run_places(measure, parallel, parallel, path, {"dtype": "bfloat16"}, 1, VIDEOS)
    for rank, (flops, sent, sequences) in enumerate(measured):
        wanted = sequences_of(model, 96, 80, [9, 1], frames=5) + sequences_of(model, 48, 64, [9], frames=9)
        assert sequences == wanted
        cost = rank_cost(model, sequences, parallel, rank)
        check(cost, flops)
        assert cost.exchanges == {kind: count for kind, count in sent.items() if count}, rank


def test_flops_of_videos(tmp_path: Path) -> None:
    check_videos(tmp_path, {})


def test_a_step_that_a_cache_skips(model_path: Path) -> None:
    config = {"steps_computation_mask": [1, 1, 0, 0], "steps_computation_policy": "static"}
    (found,) = run_places(
        measure,
        DiffusionParallelConfig(),
        DiffusionParallelConfig(),
        model_path,
        {"cache_backend": "cache_dit", "cache_config": config},
        3,
    )
    flops, _, sequences = found
    model = model_of(model_path)
    check(rank_cost(model, sequences, blocks=computed_blocks(model, cached=1.0)), flops)


def test_published_models_have_their_published_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    qwen, z = transformer_of(TRANSFORMERS["qwen-image"]), transformer_of(TRANSFORMERS["z-image"])
    assert (qwen.num_blocks, qwen.heads, qwen.head_dim, qwen.channels) == (60, 24, 128, 64)
    assert (z.num_blocks, z.num_image_layers, z.heads, z.dim, z.channels) == (30, 2, 30, 3840, 64)
    small, large = transformer_of(TRANSFORMERS["wan-1.3b"]), transformer_of(TRANSFORMERS["wan-14b"])
    assert (small.num_blocks, small.heads, small.dim, small.channels) == (30, 12, 1536, 64)
    assert (large.num_blocks, large.heads, large.dim, large.head_dim) == (40, 40, 5120, 128)
    assert sequences_of(large, 480, 832, [9, 1], frames=81) == [[Branch(0, 32760)] * 2]
    assert sequences_of(large, 720, 1280, [9], frames=81) == [[Branch(0, 75600)]]
    main(["--size", "1024x1024", "--card", "h100", "--ulysses", "2", "--tensor", "2"])
    printed = capsys.readouterr().out
    assert "qwen-image: 20.43 billion" in printed
    assert "z-image: 6.15 billion" in printed
    assert "wan-14b: 14.29 billion" in printed
    with pytest.raises(ValueError, match="got 'FluxTransformer2DModel'"):
        transformer_of({"_class_name": "FluxTransformer2DModel"})
    sees = {"_class_name": "WanTransformer3DModel", "image_dim": 1280, "added_kv_proj_dim": 5120}
    with pytest.raises(ValueError, match="got image_dim 1280"):
        transformer_of(sees)


def test_a_floor_is_arithmetic_or_bytes_whichever_takes_longer() -> None:
    card, model = CARDS["h100"], QwenImage()
    whole = rank_cost(model, sequences_of(model, 1024, 1024, [64, 6]))
    floor = floor_of(whole, card)
    assert floor.gemms == pytest.approx(whole.gemm_flops / card.bf16_flops, rel=0.05)
    assert floor.attention == pytest.approx(whole.attention_flops / card.bf16_flops)
    assert floor_of(whole, card, fp8=True).gemms == pytest.approx(floor.gemms / 2, rel=0.1)
    tiny = rank_cost(model, sequences_of(model, 32, 32, [1]))
    weights = 60 * 2 * 12 * model.dim**2 * 2 / card.memory_bytes
    assert floor_of(tiny, card).gemms == pytest.approx(weights, rel=0.01)
    parallel = DiffusionParallelConfig(ulysses_degree=4)
    quarter = floor_of(rank_cost(model, sequences_of(model, 1024, 1024, [64, 6]), parallel), card, parallel)
    # The text's products read their weights on every rank.
    assert 1 < quarter.arithmetic / (floor.arithmetic / 4) < 1.1
    assert quarter.exchanges > 0 == floor.exchanges
