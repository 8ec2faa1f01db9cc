"""The feature guide's cache examples, as a script writes them, with the demo model for a hub name: real workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vllm_omni import Omni
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

pytestmark = pytest.mark.thorough

DUAL_BLOCK = {
    "Fn_compute_blocks": 1,
    "Bn_compute_blocks": 0,
    "max_warmup_steps": 8,
    "residual_diff_threshold": 0.12,
}
EXAMPLES: dict[str, dict[str, Any]] = {
    "tea_cache with ulysses": {
        "cache_backend": "tea_cache",
        "cache_config": {"rel_l1_thresh": 0.2},
        "parallel_config": DiffusionParallelConfig(ulysses_degree=2),
    },
    "cache_dit with a ring": {
        "cache_backend": "cache_dit",
        "cache_config": DUAL_BLOCK,
        "parallel_config": DiffusionParallelConfig(ring_degree=4),
    },
    "cache_dit with cfg": {
        "cache_backend": "cache_dit",
        "parallel_config": DiffusionParallelConfig(cfg_parallel_size=2),
    },
    "cache_dit with cfg and ulysses": {
        "cache_backend": "cache_dit",
        "parallel_config": DiffusionParallelConfig(cfg_parallel_size=2, ulysses_degree=2),
    },
    "cache_dit with ulysses and a ring": {
        "cache_backend": "cache_dit",
        "parallel_config": DiffusionParallelConfig(ulysses_degree=2, ring_degree=2),
    },
    "tea_cache with tensor": {
        "cache_backend": "tea_cache",
        "cache_config": {"rel_l1_thresh": 0.2},
        "parallel_config": DiffusionParallelConfig(tensor_parallel_size=2),
    },
}
SLOW = [pytest.param(name, marks=pytest.mark.layouts) for name in list(EXAMPLES)[1:]]


@pytest.mark.parametrize("name", [next(iter(EXAMPLES)), *SLOW])
def test_an_example_of_the_guide(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    params = OmniDiffusionSamplingParams(
        num_inference_steps=20, width=64, height=96, true_cfg_scale=4.0, seed=3, output_type="np"
    )
    prompt = {"prompt": "a panda on a pink background", "negative_prompt": "low quality, blurry"}
    settings = EXAMPLES[name]
    alone = {**settings, "parallel_config": DiffusionParallelConfig(), "distributed_executor_backend": "uni"}
    with Omni(model="demo", progress_bar=False, **settings) as omni:
        (output,) = omni.generate(prompt, params)
    with Omni(model="demo", progress_bar=False, **alone) as omni:
        (wanted,) = omni.generate(prompt, params)
    assert wanted.timings["cached_steps"] >= 2
    assert output.timings["cached_steps"] == wanted.timings["cached_steps"]
    assert output.timings["cached_steps"] + output.timings["computed_steps"] == 20
    error = np.mean((output.images[0].astype(float) - wanted.images[0].astype(float)) ** 2)
    assert 10 * np.log10(255**2 / max(error, 1e-9)) >= 60
