"""Pictures that do not fit the memory whole: decoded in tiles, said in log and result, at no other's cost."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from testbed.runner_driver import QUICK, Drive, make_request
from testbed.tiny_z_image import build_tiny_z_image
from tests.diffusion.compute.vae.memory import FakeMemory
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import StepResult

pytestmark = pytest.mark.usefixtures("module_on_one_thread")

PLENTY, LITTLE = 2**40, 2**20
LARGE = make_request("large", height=288, width=64, num_inference_steps=2, seed=1)
"""Higher than a tile of either family."""
SMALL = [
    make_request(name, height=32, width=64, num_inference_steps=2, seed=seed) for name, seed in (("b", 2), ("c", 3))
]


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    defaults: dict[str, object] = {"height": 64, "width": 64}
    return build_tiny_z_image(tmp_path_factory.mktemp("models") / "z-image", heads=4, default_sampling_params=defaults)


@pytest.fixture(scope="module", params=["qwen_image", "z_image"])
def model(request: pytest.FixtureRequest, tiny_model: Path) -> Path:
    return tiny_model if request.param == "qwen_image" else request.getfixturevalue("z_image")


@pytest.fixture(scope="module")
def runner(model: Path) -> ModelRunner:
    return start(model)


@pytest.fixture(scope="module")
def whole(runner: ModelRunner) -> dict[str, np.ndarray]:
    return Drive(runner).run({0: [LARGE, *SMALL]}).images


@pytest.fixture(scope="module")
def tiled(model: Path) -> np.ndarray:
    """The large picture with the tiling of `--vae-use-tiling`."""
    return Drive(start(model, vae_use_tiling=True)).run({0: [LARGE]}).images["large"]


@pytest.fixture
def memory(runner: ModelRunner) -> Iterator[FakeMemory]:
    memory = FakeMemory(PLENTY)
    runner.pipeline.watch_memory(memory, None)  # type: ignore[attr-defined]
    yield memory
    memory.free_bytes = PLENTY


def start(model: Path, **settings: Any) -> ModelRunner:
    config = OmniDiffusionConfig(model=str(model), **settings)
    runner = ModelRunner(config, load_model_info(str(model)), options=QUICK)
    runner.start()
    return runner


def run(runner: ModelRunner, *requests: Any) -> tuple[Drive, list[str]]:
    """A run of these requests, and those that results call tiled."""
    tiled: list[str] = []

    def note(result: StepResult) -> StepResult:
        tiled.extend(result.tiled)
        return result

    return Drive(runner, merge=note).run({0: requests}), tiled


def test_a_picture_that_does_not_fit_is_that_of_the_flag(
    runner: ModelRunner,
    memory: FakeMemory,
    whole: dict[str, np.ndarray],
    tiled: np.ndarray,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert run(runner, LARGE, *SMALL)[1] == []
    assert (whole["large"] != tiled).any(), "or the test would prove nothing"
    memory.free_bytes = LITTLE
    with caplog.at_level(logging.INFO, "vllm_omni"):
        drive, said = run(runner, LARGE, *SMALL)
    assert (drive.images["large"] == tiled).all()
    for request in SMALL:  # smaller batches may round differently
        assert np.abs(drive.images[request.request_id].astype(int) - whole[request.request_id]).max() <= 1
    assert said == ["large"]
    assert [record.getMessage() for record in caplog.records if "tiles" in record.getMessage()] == [
        "request large: 64x288 is decoded in tiles: the whole does not fit the memory"
    ]


def test_a_preview_is_tiled_too_and_said_once(runner: ModelRunner, memory: FakeMemory, tiled: np.ndarray) -> None:
    memory.free_bytes = LITTLE
    drive, said = run(runner, make_request("large", **_fields(), preview_steps=(1,)))
    assert len(drive.previews["large"]) == 1
    assert (drive.images["large"] == tiled).all()
    assert said == ["large"]


def _fields() -> dict[str, Any]:
    return {"height": 288, "width": 64, "num_inference_steps": 2, "seed": 1}


@pytest.mark.parametrize("in_tiles_too", [False, True])
def test_a_decode_that_runs_out_of_memory_is_tried_once_more_in_tiles(
    runner: ModelRunner,
    memory: FakeMemory,
    whole: dict[str, np.ndarray],
    tiled: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    in_tiles_too: bool,
) -> None:
    (vae,) = runner.pipeline.components["vae"]  # type: ignore[attr-defined]
    original, attempts = vae.decode, []

    def decode(latents: torch.Tensor, **rest: Any) -> Any:
        if latents.shape[-2] == 36:
            attempts.append(vae.use_tiling)
            if in_tiles_too or not vae.use_tiling:
                raise torch.OutOfMemoryError("no room")
        return original(latents, **rest)

    monkeypatch.setattr(vae, "decode", decode)
    drive, said = run(runner, LARGE, *SMALL)
    for request in SMALL:
        assert (drive.images[request.request_id] == whole[request.request_id]).all()
    assert memory.num_releases > 0
    if in_tiles_too:
        assert {i: error.kind for i, error in drive.errors.items()} == {"large": "out_of_memory"}
    else:
        assert (drive.images["large"] == tiled).all()
        assert not drive.errors
        assert (attempts, said) == ([False, True], ["large"])
    assert not vae.use_tiling
    monkeypatch.undo()
    assert (run(runner, LARGE)[0].images["large"] == whole["large"]).all()
