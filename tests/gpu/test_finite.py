"""On a GPU, too, a picture with values that are not numbers is no result, and the host does not wait to see it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from testbed.runner_driver import Drive, make_request
from tests.diffusion.compute.worker.test_finite import BUILDERS, OVERFLOWED, change_weights
from tests.gpu.marks import COMPILES, NEEDS_GPU
from tests.gpu.test_no_waiting import Launching
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.step.finite import each_is_finite, is_finite
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig

pytestmark = [NEEDS_GPU, COMPILES]


@pytest.mark.parametrize("overlap_decode", [False, True])
def test_float16_that_overflows_says_so(tmp_path: Path, overlap_decode: bool) -> None:
    path = BUILDERS["z_image"](tmp_path / "model")

    def enlarge(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            if name.endswith("feed_forward.w2.weight"):
                weights[name] *= 1e5

    change_weights(path / "transformer", enlarge)
    requests = [make_request("a", num_inference_steps=2), make_request("b", num_inference_steps=4, preview_steps=(1,))]
    errors = {}
    for dtype in ("float16", "bfloat16"):
        config = OmniDiffusionConfig(model=str(path), dtype=dtype, device="cuda", overlap_decode=overlap_decode)
        runner = ModelRunner(config, load_model_info(str(path)))
        runner.start()
        errors[dtype] = Drive(Launching(runner)).run({0: requests}).errors  # type: ignore[arg-type]
    assert errors == {"float16": {"a": OVERFLOWED, "b": OVERFLOWED}, "bfloat16": {}}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_single_value_is_seen_wherever_it_is(dtype: torch.dtype) -> None:
    for size in (1, 33, 1000, 100_003):
        values = torch.randn((3, size), device="cuda").to(dtype)
        values[0, 0] = torch.finfo(dtype).max
        assert bool(is_finite(values))
        for bad in (float("nan"), float("inf"), -float("inf")):
            for place in {0, size // 2, size - 1}:
                spoiled = values.clone()
                spoiled[1, place] = bad
                assert not bool(is_finite(spoiled))
                assert each_is_finite(spoiled).tolist() == [True, False, True]
