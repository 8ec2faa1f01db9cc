"""Edits in every kind of layout equal those of one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from testbed.runner_driver import make_request
from testbed.tiny_models import SMALL, build_tiny_qwen_image, photo
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.worker.test_layouts import Arrivals, check_equal, draw
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.inputs.images import prepare_image

ALONE = DiffusionParallelConfig()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen_image(
        tmp_path_factory.mktemp("models") / "edit",
        heads=6,
        text_kv_heads=2,
        edit="QwenImageEditPlusPipeline",
        zero_cond_t=True,
        default_sampling_params=SMALL,
    )


@pytest.fixture(scope="module")
def arrivals(model: Path) -> Arrivals:
    """Requests with targets smaller and larger than their references, and with one and three references."""
    edit = load_model_info(str(model)).image_input
    assert edit is not None
    one, two, three = (
        prepare_image(photo(*size, seed), edit.sizes) for seed, size in enumerate([(90, 60), (64, 64), (31, 70)])
    )
    return {
        0: [
            make_request("guided", negative_prompt="a blue car", images=(one,), seed=3),
            make_request(
                "wide", height=48, width=80, num_inference_steps=5, preview_steps=(2,), images=(two, one, three)
            ),
        ],
        1: [make_request("small", "", negative_prompt="a red car", height=16, width=16, images=(three,), seed=5)],
    }


@pytest.fixture(scope="module")
def wanted(model: Path, arrivals: Arrivals) -> dict[str, np.ndarray]:
    pictures: dict[str, np.ndarray]
    ((pictures, errors),) = run_places(draw, ALONE, ALONE, model, False, arrivals)
    assert not errors
    return pictures


@pytest.mark.parametrize(
    ("ulysses", "ring", "cfg", "tensor"),
    [
        pytest.param(3, 1, 1, 1, marks=pytest.mark.thorough),
        pytest.param(1, 2, 2, 1, marks=pytest.mark.thorough),
        (1, 1, 2, 2),
        *(pytest.param(*degrees, marks=pytest.mark.layouts) for degrees in ((1, 4, 1, 1), (2, 2, 1, 1), (2, 1, 2, 1))),
    ],
)
def test_edits_of_a_layout_equal_those_of_one_process(
    model: Path, arrivals: Arrivals, wanted: dict[str, np.ndarray], ulysses: int, ring: int, cfg: int, tensor: int
) -> None:
    parallel = DiffusionParallelConfig(
        ulysses_degree=ulysses, ring_degree=ring, cfg_parallel_size=cfg, tensor_parallel_size=tensor
    )
    for drawn, errors in run_places(draw, parallel, parallel, model, False, arrivals):
        assert not errors
        check_equal(drawn, wanted)


def test_edits_with_changing_placement_and_a_shared_text_encoder(
    model: Path, arrivals: Arrivals, wanted: dict[str, np.ndarray]
) -> None:
    parallel = DiffusionParallelConfig(
        cfg_parallel_size=2, ulysses_degree=2, text_encoder_tp_size=2, vae_patch_parallel_size=2
    )
    for drawn, errors in run_places(draw, parallel, parallel, model, True, arrivals):
        assert not errors
        check_equal(drawn, wanted)
