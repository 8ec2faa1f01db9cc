"""Every layout of two and of four GPUs draws what one GPU draws: mixed batches, odd sizes, step caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from testbed.runner_driver import psnr
from testbed.tiny_models import build_tiny_qwen_image
from testbed.tiny_z_image import build_tiny_z_image
from tests.diffusion.compute.cache.test_layouts import Runs, compare
from tests.gpu.pool import Pool
from vllm_omni.diffusion.catalog.find_folder import DEMO_MODEL_PATH
from vllm_omni.diffusion.data import DiffusionParallelConfig

NUM_GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")

ONE = DiffusionParallelConfig()
LAYOUTS = {
    "ulysses 2": DiffusionParallelConfig(ulysses_degree=2),
    "ring 2": DiffusionParallelConfig(ring_degree=2),
    "cfg 2": DiffusionParallelConfig(cfg_parallel_size=2),
    "tensor 2": DiffusionParallelConfig(tensor_parallel_size=2, vae_patch_parallel_size=2, text_encoder_tp_size=2),
    "ulysses 4": DiffusionParallelConfig(ulysses_degree=4),
    "ring 4": DiffusionParallelConfig(ring_degree=4),
    "ulysses 2 x ring 2": DiffusionParallelConfig(ulysses_degree=2, ring_degree=2),
    "cfg 2 x ulysses 2": DiffusionParallelConfig(cfg_parallel_size=2, ulysses_degree=2, vae_patch_parallel_size=4),
    "tensor 4": DiffusionParallelConfig(tensor_parallel_size=4),
}
BUILDERS: dict[str, Callable[[Path], Path]] = {
    "qwen_image": lambda path: build_tiny_qwen_image(path, heads=4, layers=6, time_scale=0.1, text_kv_heads=2),
    # Its tiles hold the pictures: one GPU decodes them whole.
    "z_image": lambda path: build_tiny_z_image(path, heads=12, time_scale=0.02, text_kv_heads=2, vae_sample_size=128),
}
ROUNDING_MARGIN = 4.0
"""Decibels by which two roundings of a picture may lie farther apart than one lies from the exact one."""
CACHES: dict[tuple[str, str], dict[str, Any]] = {
    ("qwen_image", "cache_dit"): {"residual_diff_threshold": 0.2, "max_warmup_steps": 2, "Bn_compute_blocks": 1},
    ("qwen_image", "tea_cache"): {"rel_l1_thresh": 0.25, "coefficients": [1.0, 0.0]},
    ("z_image", "cache_dit"): {"residual_diff_threshold": 0.6, "max_warmup_steps": 1},
    ("z_image", "tea_cache"): {"rel_l1_thresh": 0.3, "coefficients": [1.0, 0.0]},
}


class Drawn:
    """Pictures by model, cache and layout: of one GPU only once."""

    def __init__(self, folder: Path, pool: Pool) -> None:
        self.pool = pool
        self._folder = folder
        self._of_one: dict[tuple[str, str], Runs] = {}

    def many(self, model: str, cache: str, parallel: DiffusionParallelConfig) -> list[Runs]:
        path = self._folder / model
        if not path.exists():
            BUILDERS[model](path)
        settings = {"dtype": "float32", "cache_backend": cache, "cache_config": CACHES[model, cache]}
        return self.pool.draw(parallel, path, settings)

    def one(self, model: str, cache: str) -> Runs:
        if (model, cache) not in self._of_one:
            self._of_one[model, cache] = self.many(model, cache, ONE)[0]
        return self._of_one[model, cache]

    def demo(self, dtype: str, parallel: DiffusionParallelConfig = ONE) -> dict[str, np.ndarray]:
        """Pictures of a trained model: with random weights a rounding error grows at every step."""
        (((pictures, _),), *_) = self.pool.draw(parallel, Path(DEMO_MODEL_PATH), {"dtype": dtype})
        return pictures


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drawn]:
    pool = Pool(4 if NUM_GPUS >= 4 else 2, "cuda")
    yield Drawn(tmp_path_factory.mktemp("layouts"), pool)
    pool.close()


def layout_of(name: str) -> DiffusionParallelConfig:
    parallel = LAYOUTS[name]
    if parallel.world_size > NUM_GPUS:
        pytest.skip(f"needs {parallel.world_size} GPUs")
    return parallel


@pytest.fixture(scope="module")
def rounded(drawn: Drawn) -> tuple[dict[str, np.ndarray], float]:
    """One GPU's pictures in bfloat16, and how far the farthest is from float32, in decibels."""
    pictures, exact = drawn.demo("bfloat16"), drawn.demo("float32")
    return pictures, min(psnr(pictures[i], exact[i]) for i in exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("model", "cache"), CACHES)
def test_float32(drawn: Drawn, model: str, cache: str, layout: str) -> None:
    parallel = layout_of(layout)
    assert compare(drawn.many(model, cache, parallel), parallel, drawn.one(model, cache)) > 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_rounds_as_on_one_gpu(drawn: Drawn, rounded: tuple[dict[str, np.ndarray], float], layout: str) -> None:
    wanted, rounding = rounded
    pictures = drawn.demo("bfloat16", layout_of(layout))
    found = [psnr(pictures[i], picture) for i, picture in wanted.items()]
    print(f"{layout}: {', '.join(f'{value:.1f}' for value in found)} dB; to float32 {rounding:.1f}")
    assert min(found) >= rounding - ROUNDING_MARGIN
