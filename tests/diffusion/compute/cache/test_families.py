"""Every packed family's blocks under a step cache: decisions and pictures in company are those of a request alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from testbed.runner_driver import Drive, make_request, psnr
from testbed.tiny_models import SMALL, build_tiny_qwen_image
from testbed.tiny_wan import build_tiny_wan
from testbed.tiny_z_image import build_tiny_z_image
from tests.diffusion.compute.cache.driving import started, watch_skips
from tests.diffusion.compute.cache.settings import settings_of
from tests.diffusion.compute.cache.test_layouts import COMBINED, LAYOUTS, Runs, compare, in_turn
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.worker import replica
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.plan import StepResult
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.diffusion.messages.worker import RankInfo
from vllm_omni.inputs.images import prepare_image

FIELDS: list[dict[str, Any]] = [
    {"height": 64, "width": 64, "num_inference_steps": 12, "negative_prompt": "a blue car", "seed": 1},
    {"height": 48, "width": 80, "num_inference_steps": 9, "seed": 2, "flow_shift": 3.0},
    {"height": 32, "width": 32, "num_inference_steps": 7, "negative_prompt": "", "seed": 3},
]


def edits(folder: Path) -> tuple[Path, list[DiffusionRequest]]:
    """With reference pictures of their own modulation, 2, 1 and 1 of them."""
    path = build_tiny_qwen_image(
        folder,
        heads=4,
        layers=3,
        time_scale=0.3,
        edit="QwenImageEditPlusPipeline",
        zero_cond_t=True,
        default_sampling_params=SMALL,
    )
    edit = load_model_info(str(path)).image_input
    assert edit is not None
    noise = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    images = [prepare_image(Image.fromarray(pixels), edit.sizes) for pixels in noise]
    pictures = [(images[0], images[1]), (images[1],), (images[2],)]
    return path, [make_request(f"r-{i}", images=p, **fields) for i, (p, fields) in enumerate(zip(pictures, FIELDS))]


def z_images(folder: Path) -> tuple[Path, list[DiffusionRequest]]:
    return build_tiny_z_image(folder, heads=4, time_scale=0.02, default_sampling_params=SMALL), [
        make_request(f"r-{i}", **fields) for i, fields in enumerate(FIELDS)
    ]


def videos(folder: Path) -> tuple[Path, list[DiffusionRequest]]:
    """Two transformers, and several frames."""
    path = build_tiny_wan(
        folder, "t2v-a14b", heads=4, layers=3, time_scale=0.05, flow_shift=5.0, default_sampling_params=SMALL
    )
    return path, [
        make_request(f"r-{i}", num_frames=frames, max_sequence_length=24, **fields)
        for i, (frames, fields) in enumerate(zip((5, 9, 1), FIELDS))
    ]


Family = Callable[[Path], tuple[Path, list[DiffusionRequest]]]


@cache
def made(family: Family, folder: Path) -> tuple[Path, list[DiffusionRequest]]:
    """Model and requests of a family, made once for all tests."""
    return family(folder)


@cache
def plain(path: Path, request: DiffusionRequest) -> np.ndarray:
    """Picture without a step cache."""
    return Drive(started(path, "none")).run({0: [request]}).images[request.request_id]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("family", [edits, z_images, videos])
def test_decisions_and_pictures_are_those_of_the_request_alone(folder: Path, backend: str, family: Any) -> None:
    path, requests = made(family, folder / family.__name__)
    runner = started(path, backend, settings_of(backend, family.__name__))
    skips = watch_skips(runner)
    together = Drive(runner).run({0: requests[:1], 2: requests[1:]})
    assert together.errors == {}
    seen = {request_id: [list(steps) for steps in branches] for request_id, branches in skips.items()}
    skips.clear()
    for request in requests:
        alone = Drive(runner).run({0: [request]})
        assert psnr(together.images[request.request_id], alone.images[request.request_id]) >= 60
    assert seen == skips
    assert sum(len(steps) for branches in seen.values() for steps in branches) >= 5, "nothing was skipped"
    assert (plain(path, requests[0]) != together.images["r-0"]).any(), "skipping must show"


def draw(
    place: RankInfo,
    parallel: DiffusionParallelConfig,
    path: Path,
    backend: str,
    settings: dict[str, Any],
    requests: list[DiffusionRequest],
) -> Runs:
    """Pictures, and what this rank skipped."""
    runner = replica.started(place, parallel, path, cache_backend=backend, cache_config=settings)
    skips = watch_skips(runner)
    placed = partial(in_turn, parallel.cfg_parallel_size)
    drive = Drive(runner, placed, replica.merging(runner)).run({0: requests[:1], 2: requests[1:]})
    assert drive.errors == {}
    return [(drive.images, dict(skips))]


@pytest.mark.parametrize(
    ("family", "layouts"),
    [
        pytest.param(edits, COMBINED[:1], id="edits"),
        pytest.param(z_images, COMBINED[1:], id="z_images"),
        pytest.param(videos, COMBINED[1:], id="videos"),
        pytest.param(edits, COMBINED[1:], id="edits, another layout", marks=pytest.mark.layouts),
        pytest.param(z_images, COMBINED[:1], id="z_images, another layout", marks=pytest.mark.layouts),
        pytest.param(videos, COMBINED[:1], id="videos, another layout", marks=pytest.mark.layouts),
    ],
)
def test_layouts_decide_as_one_process(folder: Path, backend: str, family: Any, layouts: Sequence[str]) -> None:
    path, requests = made(family, folder / family.__name__)
    settings = settings_of(backend, family.__name__)
    one = DiffusionParallelConfig()
    (wanted,) = run_places(draw, one, one, path, backend, settings, requests)
    for layout in layouts:
        parallel = LAYOUTS[layout]
        by_rank = run_places(draw, parallel, parallel, path, backend, settings, requests)
        assert compare(by_rank, parallel, wanted) >= 5, "nothing was skipped"


def test_a_step_whose_guidance_has_ended_is_skipped_as_a_whole(folder: Path) -> None:
    path, _ = made(z_images, folder / "z_images")
    mask = [1, 1, 1, 0, 1, 0, 0, 0, 0, 0]
    static = {"steps_computation_mask": mask, "steps_computation_policy": "static"}
    runner = started(path, "cache_dit", static)
    request = make_request("a", negative_prompt="apple", num_inference_steps=len(mask), cfg_truncation=0.2)
    results: list[StepResult] = []

    def note(result: StepResult) -> StepResult:
        results.append(result)
        return result

    drive = Drive(runner, merge=note).run({0: [request]})
    assert drive.errors == {}
    steps = [result for result in results if result.advanced]
    num_sequences = [result.num_sequences for result in steps]
    assert num_sequences == sorted(num_sequences, reverse=True)
    assert set(num_sequences) == {1, 2}
    assert [result.cached.get("a", 0) for result in steps] == [1 - computed for computed in mask]
