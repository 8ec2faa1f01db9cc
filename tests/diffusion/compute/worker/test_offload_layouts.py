"""Blocks that stream on several ranks: each has its share of the weights, and pictures are those of the same layout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from testbed.runner_driver import Drive, make_request
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.offload.checked_copies import CheckedCopies
from tests.diffusion.compute.worker.replica import merging, started
from tests.diffusion.compute.worker.test_layouts import BUILDERS, placed_in_turn
from vllm_omni.diffusion.compute.offload import layer_offload
from vllm_omni.diffusion.compute.offload.layer_offload import LayerOffload
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.diffusion.messages.worker import RankInfo

LAYOUTS: dict[str, dict[str, int]] = {
    "tensor": {"tensor_parallel_size": 2, "text_encoder_tp_size": 2},
    "ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "cfg": {"cfg_parallel_size": 2},
}
FAST = {("qwen_image", "tensor"), ("qwen_image", "ulysses")}
"""Cases of the default run."""
OFFLOAD: dict[str, Any] = {"enable_layerwise_offload": True, "resident_layers": 0}


def requests_of(family: str) -> list[DiffusionRequest]:
    frames: dict[str, Any] = {"num_frames": 5, "max_sequence_length": 24} if family == "wan" else {}
    return [
        make_request("guided", negative_prompt="a blue car", num_inference_steps=3, seed=3, **frames),
        make_request("wide", "a photo", height=48, width=80, num_inference_steps=2, **frames),
    ]


def draw(
    place: RankInfo,
    parallel: DiffusionParallelConfig,
    path: Path,
    requests: Sequence[DiffusionRequest],
    settings: dict[str, Any],
) -> tuple[dict[str, np.ndarray], int]:
    """Pictures that this rank decodes, and bytes of its weights in host memory."""
    runner = started(place, parallel, path, **settings)
    placed = partial(placed_in_turn, parallel.cfg_parallel_size)
    drive = Drive(runner, placed, merging(runner)).run({0: requests[:1], 1: requests[1:]})
    assert not drive.errors
    offload: LayerOffload | None = getattr(runner.pipeline, "layer_offload", None)
    return drive.images, 0 if offload is None else offload.num_host_bytes


CASES = [
    pytest.param(family, layout, marks=() if (family, layout) in FAST else pytest.mark.layouts)
    for family in BUILDERS
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_every_axis_draws_the_same(tmp_path: Path, family: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_offload, "copies_for", lambda device: CheckedCopies())
    sizes = {} if family == "z_image" else {"layers": 3}  # Z-Image has two refiners beside its three layers
    path = BUILDERS[family](tmp_path / "model", heads=4, text_kv_heads=2, **sizes)
    requests, parallel, one = requests_of(family), DiffusionParallelConfig(**LAYOUTS[layout]), DiffusionParallelConfig()
    plain = run_places(draw, parallel, parallel, path, requests, {})
    streamed = run_places(draw, parallel, parallel, path, requests, OFFLOAD)
    for (got, _), (wanted, _) in zip(streamed, plain, strict=True):
        assert got.keys() == wanted.keys()
        for name, picture in wanted.items():
            assert np.array_equal(got[name], picture), name
    assert {name for got, _ in streamed for name in got} == {"guided", "wide"}
    if layout == "tensor":
        ((_, all_bytes),) = run_places(draw, one, one, path, requests[1:], OFFLOAD)
        assert all(0.4 * all_bytes < num_bytes < 0.6 * all_bytes for _, num_bytes in streamed)
