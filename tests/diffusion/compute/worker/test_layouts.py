"""Pictures of parallel layouts equal those of one process: runners on gloo ranks, mixed batches, odd sizes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from testbed.runner_driver import Drive, make_request, psnr
from testbed.tiny_models import SMALL, build_tiny_qwen_image
from testbed.tiny_wan import build_tiny_wan
from testbed.tiny_z_image import build_tiny_z_image
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.worker.replica import merging, started
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.diffusion.messages.worker import RankInfo

ARRIVALS: dict[int, list[DiffusionRequest]] = {
    0: [
        make_request("guided", negative_prompt="a blue car", seed=3),
        make_request("wide", "a photo", height=48, width=80, num_inference_steps=5, preview_steps=(2,)),
    ],
    1: [make_request("short", "", negative_prompt="a red car and a blue apple", height=16, width=16, seed=5)],
    2: [make_request("tall", "apple " * 20, height=80, width=48, num_inference_steps=2, seed=9)],
}


VIDEO_ARRIVALS = {
    step: [replace(request, num_frames=frames, max_sequence_length=24) for request, frames in zip(joining, (5, 9))]
    for step, joining in ARRIVALS.items()
}
Arrivals = Mapping[int, Sequence[DiffusionRequest]]


def draw(
    rank_info: RankInfo,
    parallel: DiffusionParallelConfig,
    path: Path,
    moving: bool = False,
    arrivals: Arrivals = ARRIVALS,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Pictures, previews and first velocities by request id, and errors. moving: every step has another placement."""
    runner = started(rank_info, parallel, path)
    placed = partial(placed_at_random if moving else placed_in_turn, parallel.cfg_parallel_size)
    velocities = first_velocities(runner, placed, arrivals)
    drive = Drive(runner, placed, merging(runner)).run(arrivals)
    previews = {f"{request_id}/preview": images[0] for request_id, images in drive.previews.items()}
    return drive.images | previews | velocities, drive.errors


@torch.inference_mode()
def first_velocities(runner: ModelRunner, placed: Any, arrivals: Arrivals) -> dict[str, np.ndarray]:
    """Velocity of each guidance branch of all requests, from one pack."""
    states = []
    for request in (request for joining in arrivals.values() for request in joining):
        runner.pipeline.check(request)
        runner.pipeline.admit(request)
        states.append(runner.pipeline.encode(request))
    placement = placed(0, {s.request.request_id: len(s.sequence_lengths) for s in states})
    branches = runner.pipeline.predict(states, [g for groups in placement.values() for g in groups])
    for state in states:
        runner.pipeline.forget(state)
        runner.pipeline.release(state.request.request_id)
    return {
        f"{state.request.request_id}/velocity {i}": velocity.numpy()
        for state, velocities in zip(states, branches)
        for i, velocity in enumerate(velocities)
    }


def placed_in_turn(groups: int, step_id: int, branches: Mapping[str, int]) -> dict[str, list[int]]:
    return {i: [(n + branch) % groups for branch in range(count)] for n, (i, count) in enumerate(branches.items())}


def placed_at_random(groups: int, step_id: int, branches: Mapping[str, int]) -> dict[str, list[int]]:
    dice = random.Random(step_id)  # the same on all ranks
    return {i: [dice.randrange(groups) for _ in range(count)] for i, count in branches.items()}


def build_wan(path: Path, *, text_kv_heads: int = 2, **sizes: Any) -> Path:
    """With two transformers."""
    return build_tiny_wan(path, "t2v-a14b", text_heads=text_kv_heads, default_sampling_params=SMALL, **sizes)


BUILDERS: dict[str, Callable[..., Path]] = {
    "qwen_image": partial(build_tiny_qwen_image, default_sampling_params=SMALL),
    "z_image": partial(build_tiny_z_image, default_sampling_params=SMALL),
    "wan": build_wan,
}
ARRIVALS_OF: dict[str, Arrivals] = {"qwen_image": ARRIVALS, "z_image": ARRIVALS, "wan": VIDEO_ARRIVALS}


class Reference:
    """Models by family and number of heads, and the pictures of one process with them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pictures: dict[tuple[str, int], dict[str, np.ndarray]] = {}

    def path(self, family: str, heads: int) -> Path:
        path = self._folder / f"{family}-{heads}-heads"
        return path if path.exists() else BUILDERS[family](path, heads=heads)

    def pictures(self, family: str, heads: int) -> dict[str, np.ndarray]:
        if (family, heads) not in self._pictures:
            threads = torch.get_num_threads()
            path, arrivals = self.path(family, heads), ARRIVALS_OF[family]
            pictures, errors = draw(RankInfo(), DiffusionParallelConfig(), path, arrivals=arrivals)
            torch.set_num_threads(threads)
            assert not errors
            self._pictures[family, heads] = pictures
        return self._pictures[family, heads]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("layouts"))


def check(
    reference: Reference, family: str, heads: int, parallel: DiffusionParallelConfig, moving: bool = False
) -> None:
    wanted, path = reference.pictures(family, heads), reference.path(family, heads)
    for drawn, errors in run_places(draw, parallel, parallel, path, moving, ARRIVALS_OF[family]):
        assert not errors
        check_equal(drawn, wanted)


def check_equal(drawn: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert set(drawn) == set(wanted)
    for name, values in wanted.items():
        if "velocity" in name:
            assert np.abs(values).max() > 0.5
            np.testing.assert_allclose(drawn[name], values, atol=1e-4, rtol=1e-4)
        else:
            assert values.std() > 2, "a flat picture proves nothing"
            assert psnr(drawn[name], values) >= 60


# Ulysses with CFG, and with tensor, are in the tests below; the layouts' run has every layout.
LAYOUTS = [
    # heads, ulysses, ring, cfg, tensor
    (6, 3, 2, 1, 1),
    (6, 1, 2, 2, 2),
]
Z_IMAGE_LAYOUTS = [
    (3, 2, 2, 1, 1),
    (6, 1, 2, 1, 2),
]
WAN_LAYOUTS = Z_IMAGE_LAYOUTS
CASES = [
    (family, *layout)
    for family, layouts in (("qwen_image", LAYOUTS), ("z_image", Z_IMAGE_LAYOUTS), ("wan", WAN_LAYOUTS))
    for layout in layouts
]


@pytest.mark.parametrize(("family", "heads", "ulysses", "ring", "cfg", "tensor"), CASES)
def test_pictures_of_a_layout_equal_those_of_one_process(
    reference: Reference, family: str, heads: int, ulysses: int, ring: int, cfg: int, tensor: int
) -> None:
    parallel = DiffusionParallelConfig(
        ulysses_degree=ulysses, ring_degree=ring, cfg_parallel_size=cfg, tensor_parallel_size=tensor
    )
    check(reference, family, heads, parallel)


def every_layout() -> list[tuple[Any, ...]]:
    degrees = itertools.product(BUILDERS, (3, 5, 6, 24), (1, 2, 3, 4), (1, 2), (1, 2), (1, 2))
    return [
        (family, heads, ulysses, ring, cfg, tensor)
        for family, heads, ulysses, ring, cfg, tensor in degrees
        if 1 < ulysses * ring * cfg * tensor <= 8 and heads % tensor == 0 and ulysses <= heads // tensor
    ]


@pytest.mark.layouts
@pytest.mark.parametrize(("family", "heads", "ulysses", "ring", "cfg", "tensor"), every_layout())
def test_pictures_of_every_layout_equal_those_of_one_process(
    reference: Reference, family: str, heads: int, ulysses: int, ring: int, cfg: int, tensor: int
) -> None:
    test_pictures_of_a_layout_equal_those_of_one_process(reference, family, heads, ulysses, ring, cfg, tensor)


@pytest.mark.parametrize("family", BUILDERS)
def test_the_placement_may_change_at_every_step(reference: Reference, family: str) -> None:
    check(reference, family, 3, DiffusionParallelConfig(cfg_parallel_size=3, ulysses_degree=2), moving=True)


@pytest.mark.parametrize("family", BUILDERS)
def test_ranks_may_share_decodes_and_the_text_encoder(family: str, tmp_path: Path) -> None:
    parallel = DiffusionParallelConfig(
        ulysses_degree=2, tensor_parallel_size=2, vae_patch_parallel_size=2, text_encoder_tp_size=2
    )
    path = BUILDERS[family](tmp_path / "model", heads=4, text_kv_heads=2)
    one, arrivals = DiffusionParallelConfig(), ARRIVALS_OF[family]
    ((wanted, errors),) = run_places(draw, one, one, path, False, arrivals)
    assert not errors
    for drawn, errors in run_places(draw, parallel, parallel, path, False, arrivals):
        assert not errors
        check_equal(drawn, wanted)
