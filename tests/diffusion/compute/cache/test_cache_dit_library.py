"""Our Dual Block Cache against the cache-dit library on the same small model: same steps skipped, same pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cache_dit
import numpy as np
import pytest
import torch
from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig
from diffusers import QwenImagePipeline

from testbed.runner_driver import make_request, psnr
from tests.diffusion.compute.cache.driving import draw
from vllm_omni.diffusion.compute.cache.step_masks import steps_mask
from vllm_omni.diffusion.messages.request import DiffusionRequest

STEPS = 20
REQUEST = make_request(
    "r", negative_prompt="a blue car", num_inference_steps=STEPS, height=64, width=80, true_cfg_scale=3.0, seed=7
)
MASK = (1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1)


@pytest.fixture(scope="module")
def uncached(calm_model: Path) -> np.ndarray:
    drive, _ = draw(calm_model, "none", {}, {0: [REQUEST]})
    return drive.images["r"]


def with_library(
    path: Path, request: DiffusionRequest, config: dict[str, Any], taylor_order: int | None
) -> tuple[np.ndarray, list[list[int]]]:
    """The library's picture and the steps that it skipped, of both guidance branches."""
    pipe = QwenImagePipeline.from_pretrained(path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    calibrator = None if taylor_order is None else TaylorSeerCalibratorConfig(taylorseer_order=taylor_order)
    settings = {"max_warmup_steps": 4, "max_continuous_cached_steps": 3, **config}
    settings = {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.24, **settings}
    cache_dit.enable_cache(
        pipe,
        cache_config=DBCacheConfig(num_inference_steps=request.num_inference_steps, **settings),
        calibrator_config=calibrator,
    )
    image = pipe(
        request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=request.num_inference_steps,
        true_cfg_scale=request.true_cfg_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
    ).images[0]
    stats = cache_dit.summary(pipe, logging=False)[0]
    return (image * 255).round().astype(np.uint8), [list(stats.cached_steps), list(stats.cfg_cached_steps)]


CASES: dict[str, tuple[dict[str, Any], int | None]] = {
    "plain": ({}, None),
    "tight": ({"residual_diff_threshold": 0.181, "max_warmup_steps": 2}, None),
    "last blocks": ({"residual_diff_threshold": 0.35, "Fn_compute_blocks": 2, "Bn_compute_blocks": 2}, None),
    "order 1": ({}, 1),
    "order 2": ({"residual_diff_threshold": 0.3, "Bn_compute_blocks": 1}, 2),
    "order 3": ({"residual_diff_threshold": 0.3, "max_warmup_steps": 6}, 3),
    "policy": ({"scm_steps_mask_policy": "fast", "residual_diff_threshold": 0.3}, None),
    "static mask": ({"steps_computation_mask": MASK, "steps_computation_policy": "static"}, 1),
    "mask shorter than the request": ({"steps_computation_mask": MASK[:13], "residual_diff_threshold": 0.3}, None),
    "interval": ({"max_warmup_steps": 12, "warmup_interval": 3, "residual_diff_threshold": 0.3}, None),
    "at most 5": ({"max_cached_steps": 5, "max_continuous_cached_steps": -1, "residual_diff_threshold": 0.5}, None),
    # Some steps between are computed; their changes count as well.
    "accumulated": ({"max_accumulated_residual_diff_threshold": 1.0, "residual_diff_threshold": 0.2}, None),
    "always": ({"residual_diff_threshold": 1.0}, None),
}
THOROUGH = ("plain", "order 1", "order 2", "policy", "always")
"""Cases whose settings are also parts of the others."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough if name in THOROUGH else ()) for name in CASES]
)
def test_the_library_skips_the_same_steps_and_draws_the_same_picture(
    calm_model: Path, uncached: np.ndarray, name: str
) -> None:
    config, order = CASES[name]
    ours = dict(config) if order is None else {**config, "enable_taylorseer": True, "taylorseer_order": order}
    theirs = dict(config)
    if policy := theirs.pop("scm_steps_mask_policy", None):
        theirs["steps_computation_mask"] = cache_dit.steps_mask(mask_policy=policy, total_steps=STEPS)
    wanted, wanted_skips = with_library(calm_model, REQUEST, theirs, order)

    drive, skips = draw(calm_model, "cache_dit", ours, {0: [REQUEST]})

    assert len(wanted_skips[0]) >= 3, "a cache that skips nothing proves nothing"
    assert skips["r"] == wanted_skips
    assert psnr(uncached, wanted) < 65, "a cache that leaves the picture as it is proves nothing"
    assert psnr(drive.images["r"], wanted) >= 75


def test_a_static_mask_says_nothing_of_steps_beyond_its_end(calm_model: Path) -> None:
    """The library skips them all, the last one too: there a mask has as many entries as the only request has steps."""
    short = {"steps_computation_mask": (1, 1, 0, 1, 0), "steps_computation_policy": "static"}
    _, skips = draw(
        calm_model, "cache_dit", short, {0: [REQUEST, replace(REQUEST, request_id="s", num_inference_steps=3)]}
    )
    assert skips == {"r": [[2, 4]] * 2, "s": [[2]] * 2}


def test_masks_are_those_of_the_library() -> None:
    for policy in ("slow", "medium", "fast", "ultra"):
        for num_steps in (4, 6, *range(8, 201)):
            wanted = cache_dit.steps_mask(mask_policy=policy, total_steps=num_steps)
            assert list(steps_mask(policy, num_steps)) == wanted
        for num_steps in (1, 2, 3, 5, 7):
            assert steps_mask(policy, num_steps) == (1,) * num_steps, "the library refuses these"
