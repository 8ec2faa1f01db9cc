"""Blocks of which each rank keeps a part: pictures of the same layout, bytes of each rank, errors on one rank."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from testbed.runner_driver import Drive, psnr
from testbed.tiny_adapters import random_pairs, save_peft, transformer_of
from tests.diffusion.compute.cache.driving import watch_skips
from tests.diffusion.compute.cache.settings import settings_of
from tests.diffusion.compute.cache.test_families import edits
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.worker.replica import merging, started
from tests.diffusion.compute.worker.test_layouts import BUILDERS, placed_in_turn
from tests.diffusion.compute.worker.test_offload_layouts import requests_of
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.memory.planned_model import plan_packed
from vllm_omni.diffusion.compute.offload.gathered import WeightSharding, part_bytes
from vllm_omni.diffusion.compute.offload.layer_offload import BLOCKS
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest, LoRA
from vllm_omni.diffusion.messages.worker import RankInfo
from vllm_omni.errors import ConfigError

LAYOUTS: dict[str, dict[str, int]] = {
    "ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "ulysses and ring": {"ulysses_degree": 2, "ring_degree": 2},
    "ulysses of three": {"ulysses_degree": 3},
    "cfg and ulysses": {"cfg_parallel_size": 2, "ulysses_degree": 2},
    "tensor and ring": {"tensor_parallel_size": 2, "ring_degree": 2},
}
FAST = {("qwen_image", "ulysses")}
"""Cases of the default run."""
ONE = DiffusionParallelConfig()


def sharding_of(runner: ModelRunner) -> WeightSharding | None:
    offload: WeightSharding | None = getattr(runner.pipeline, "layer_offload", None)
    return offload


def device_bytes(runner: ModelRunner) -> int:
    """Bytes of the memory that the model's parameters are views of, and of the parts of blocks."""
    components: dict[str, Any] = getattr(runner.pipeline, "components")  # noqa: B009 - of packed families alone
    tensors = [t for its in components.values() for m in its for t in chain(m.parameters(), m.buffers())]
    storages: dict[int, int] = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    sharding = sharding_of(runner)
    return sum(storages.values()) + (0 if sharding is None else sharding.num_part_bytes)


def predicted_savings(runner: ModelRunner, num_ranks: int) -> int:
    """Bytes that sharding should save on a rank: of the blocks' matrices all but the part and two slots."""
    sharding = sharding_of(runner)
    assert sharding is not None
    sizes = [unit.weights.num_bytes for units in sharding._units[BLOCKS] for unit in units]
    parts = [part_bytes(size, num_ranks) for size in sizes]
    return sum(sizes) - sum(parts) - 2 * num_ranks * max(parts)


def draw(
    place: RankInfo,
    parallel: DiffusionParallelConfig,
    path: Path,
    requests: Sequence[DiffusionRequest],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Pictures that this rank decodes, the model's bytes on its device, and the predicted savings."""
    runner = started(place, parallel, path, **settings)
    skips = watch_skips(runner) if "cache_backend" in settings else {}
    drive = Drive(runner, partial(placed_in_turn, parallel.cfg_parallel_size), merging(runner)).run(
        {0: requests[:1], 1: requests[1:]}
    )
    assert not drive.errors
    num_shards = parallel.ulysses_degree * parallel.ring_degree
    savings = predicted_savings(runner, num_shards) if settings.get("weight_sharding") else 0
    num_skipped = sum(map(len, chain.from_iterable(skips.values())))
    return {"images": drive.images, "bytes": device_bytes(runner), "savings": savings, "skipped": num_skipped}


def check_same(
    parallel: DiffusionParallelConfig, path: Path, requests: Sequence[DiffusionRequest], **settings: Any
) -> list[dict[str, Any]]:
    """Require the pictures of the layout without sharding; returns what each rank reports."""
    plain = run_places(draw, parallel, parallel, path, requests, settings)
    sharded = run_places(draw, parallel, parallel, path, requests, {**settings, "weight_sharding": True})
    for got, wanted in zip(sharded, plain, strict=True):
        assert got["images"].keys() == wanted["images"].keys()
        for name, picture in wanted["images"].items():
            assert np.array_equal(got["images"][name], picture), name
        padding = 256 * 200  # runs are aligned
        assert abs(wanted["bytes"] - got["bytes"] - got["savings"]) < padding
    return sharded


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param(family, layout, marks=() if (family, layout) in FAST else pytest.mark.layouts)
        for family in ("qwen_image", "z_image", "wan")
        for layout in LAYOUTS
    ],
)
def test_every_layout_draws_the_same_and_ranks_keep_parts(tmp_path: Path, family: str, layout: str) -> None:
    sizes = {"layers": 8} if family == "qwen_image" else {}
    path = BUILDERS[family](tmp_path / "model", heads=4, text_kv_heads=2, **sizes)
    requests, parallel = requests_of(family), DiffusionParallelConfig(**LAYOUTS[layout])
    sharded = check_same(parallel, path, requests)
    if family == "qwen_image":
        assert all(its["savings"] > 0 for its in sharded)
    (alone,) = run_places(draw, ONE, ONE, path, requests, {})
    images = {name: picture for its in sharded for name, picture in its["images"].items()}
    for name, picture in alone["images"].items():
        assert psnr(images[name], picture) >= 55


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"cache_backend": "cache_dit"}, marks=pytest.mark.thorough),
        pytest.param({"cache_backend": "tea_cache"}, marks=pytest.mark.thorough),
        pytest.param({"quantization": "fp8"}, marks=pytest.mark.thorough),
    ],
    ids=lambda settings: next(iter(settings.values())),
)
def test_step_caches_adapters_and_float8_draw_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    path, (first, *others) = edits(tmp_path / "model")
    file = save_peft(random_pairs(transformer_of(path), 1), tmp_path / "adapter.safetensors")
    requests = [replace(first, loras=(LoRA("one", str(file), 1.0),)), *others]
    if backend := settings.get("cache_backend"):
        settings = {**settings, "cache_config": settings_of(backend, "edits")}
    sharded = check_same(DiffusionParallelConfig(ulysses_degree=2), path, requests, **settings)
    if backend:
        assert any(its["skipped"] for its in sharded), "nothing was skipped"


def draw_with_fault(place: RankInfo, parallel: DiffusionParallelConfig, path: Path) -> list[dict[str, np.ndarray]]:
    """Pictures before, and after errors in the middle of different blocks of the last rank."""
    runner = started(place, parallel, path, weight_sharding=True)
    transformer: Any = getattr(runner.pipeline, "transformer")  # noqa: B009
    requests = requests_of("qwen_image")
    drawn = []
    for number in (None, 0, 2, 4):
        if number is not None:
            hooks = []
            if place.rank == place.replica_size - 1:
                fault = Mock(side_effect=RuntimeError("a fault inside the block"))
                hooks.append(transformer.blocks[number].image.up.register_forward_hook(fault))
            failed = Drive(runner, merge=merging(runner)).run({0: requests[:1]})
            assert failed.errors.keys() == {"guided"}
            for hook in hooks:
                hook.remove()
        drive = Drive(runner, merge=merging(runner)).run({0: requests[:1], 1: requests[1:]})
        assert not drive.errors
        drawn.append(drive.images)
    return drawn


def test_after_an_error_on_one_rank_all_gather_the_same_blocks_again(tmp_path: Path) -> None:
    path = BUILDERS["qwen_image"](tmp_path / "model", layers=5)
    parallel = DiffusionParallelConfig(ulysses_degree=2)
    for first, *others in run_places(draw_with_fault, parallel, parallel, path):
        for images in others:
            assert images.keys() == first.keys()
            assert all(np.array_equal(images[name], first[name]) for name in first)


def test_settings_that_do_not_go_together_are_refused() -> None:
    for settings, words in (
        ({}, "one of which must be more than 1, got data 1 x cfg 1 x ring 1 x ulysses 1 x tensor 1 = 1"),
        (
            {"parallel": DiffusionParallelConfig(cfg_parallel_size=2, tensor_parallel_size=2)},
            "ranks of --usp and --ring",
        ),
        ({"enable_layerwise_offload": True}, "--enable-layerwise-offload or --weight-sharding, got both"),
        ({"enable_cpu_offload": True}, "--enable-cpu-offload or --weight-sharding, got both"),
    ):
        given: dict[str, Any] = {"weight_sharding": True, **settings}
        with pytest.raises(ConfigError, match=words):
            OmniDiffusionConfig("demo", **given)


def test_the_memory_of_a_rank_is_known_without_weights() -> None:
    info = load_model_info("demo")
    assert isinstance(info, PackedModelInfo)
    config = OmniDiffusionConfig("demo", parallel=DiffusionParallelConfig(ulysses_degree=2, cfg_parallel_size=2))
    whole = plan_packed(config, info, torch.float32)
    parts = plan_packed(replace(config, weight_sharding=True), info, torch.float32, rank=3)
    assert parts.weight_bytes == whole.weight_bytes
    assert (whole.host_bytes, whole.slot_bytes) == (0, 0)
    blocks = parts.step_weight_bytes
    assert 0.45 * blocks < parts.host_bytes <= 0.5 * blocks, "the other rank of the sequence has half of the matrices"
    assert 0 < parts.slot_bytes < blocks


def test_a_start_says_what_each_rank_keeps(tmp_path: Path) -> None:
    path = BUILDERS["qwen_image"](tmp_path / "model", layers=3)
    parallel = DiffusionParallelConfig(ring_degree=2)
    for lines in run_places(lines_of_start, parallel, parallel, path):
        assert any(line.startswith("weight sharding: each of 2 ranks keeps 0.00 GiB of 3 blocks") for line in lines)


def lines_of_start(place: RankInfo, parallel: DiffusionParallelConfig, path: Path) -> list[str]:
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("vllm_omni")
    logger.addHandler(Lines())
    logger.setLevel(logging.INFO)
    started(place, parallel, path, weight_sharding=True)
    return lines
