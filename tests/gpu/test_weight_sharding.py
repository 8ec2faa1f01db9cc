"""GPUs that keep parts of the blocks and gather them draw what GPUs with whole blocks draw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from testbed.runner_driver import psnr
from tests.gpu.pool import Pool
from vllm_omni.diffusion.catalog.find_folder import DEMO_MODEL_PATH
from vllm_omni.diffusion.data import DiffusionParallelConfig

NUM_GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")
LAYOUTS = {
    "ulysses 2": DiffusionParallelConfig(ulysses_degree=2),
    "ring 2": DiffusionParallelConfig(ring_degree=2),
    "cfg 2 x ulysses 2": DiffusionParallelConfig(cfg_parallel_size=2, ulysses_degree=2),
    "tensor 2 x ring 2": DiffusionParallelConfig(tensor_parallel_size=2, ring_degree=2),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(4 if NUM_GPUS >= 4 else 2, "cuda")
    yield pool
    pool.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_are_the_same(pool: Pool, layout: str) -> None:
    parallel = LAYOUTS[layout]
    if parallel.world_size > NUM_GPUS:
        pytest.skip(f"needs {parallel.world_size} GPUs")
    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "attention_backend": "sdpa"}
    wanted = pool.draw(parallel, Path(DEMO_MODEL_PATH), settings)
    found = pool.draw(parallel, Path(DEMO_MODEL_PATH), {**settings, "weight_sharding": True})
    for rank, (((pictures, _),), ((expected, _),)) in enumerate(zip(found, wanted, strict=True)):
        assert pictures.keys() == expected.keys()
        for name, picture in expected.items():
            value = psnr(pictures[name], picture)
            print(f"{layout}, rank {rank}, {name}: {value:.1f} dB")
            assert value >= 60
