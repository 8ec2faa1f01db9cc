"""Transformers from single files on a GPU: the same pictures, and float8 values that stay as they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from testbed.runner_driver import QUICK, Drive, make_request, psnr
from testbed.single_files import expanded, folder_weights, save, scaled_float8, with_prefix
from tests.gpu.marks import NEEDS_GPU
from vllm_omni.diffusion.catalog.find_folder import DEMO_MODEL_PATH
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.device.device import why_no_float8
from vllm_omni.diffusion.compute.layers.fp8 import Fp8ColumnLinear
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import DType, OmniDiffusionConfig

pytestmark = NEEDS_GPU
REQUESTS = {
    0: [make_request(f"r-{seed}", "a red apple", height=128, width=128, num_inference_steps=8, seed=seed)
        for seed in range(3)]
}  # fmt: skip


def drawn(dtype: DType = "bfloat16", **settings: Any) -> tuple[dict[str, np.ndarray], dict[str, Fp8ColumnLinear]]:
    """Pictures, and the float8 layers by path."""
    config = OmniDiffusionConfig(
        model=str(DEMO_MODEL_PATH), dtype=dtype, enforce_eager=True, progress_bar=False, **settings
    )
    runner = ModelRunner(config, load_model_info(str(DEMO_MODEL_PATH)), options=QUICK)
    runner.start()
    drive = Drive(runner).run(REQUESTS)
    assert drive.errors == {}
    pipeline: Any = runner.pipeline
    layers = {path: layer for path, layer in pipeline.transformer.named_modules() if isinstance(layer, Fp8ColumnLinear)}
    return drive.images, layers


def least_psnr(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    return min(psnr(got[name], want[name]) for name in want)


def test_a_file_draws_what_the_folder_draws(tmp_path: Path) -> None:
    file = save(with_prefix(folder_weights(DEMO_MODEL_PATH), "model.diffusion_model."), tmp_path / "x.safetensors")
    (got, layers), (want, _) = drawn(transformer_file=str(file)), drawn()
    assert layers == {}
    assert least_psnr(got, want) >= 50


def test_a_float8_file_runs_in_float8_where_the_gpu_can(tmp_path: Path) -> None:
    weights = {name: weight.float() for name, weight in folder_weights(DEMO_MODEL_PATH).items()}
    stored = scaled_float8(weights, lambda name: True)
    file = save(with_prefix(stored, "diffusion_model."), tmp_path / "fp8.safetensors")
    plain = save(expanded(stored), tmp_path / "plain.safetensors")
    got, layers = drawn(transformer_file=str(file))
    want, _ = drawn(transformer_file=str(plain))
    if why_no_float8(torch.device("cuda"), torch.bfloat16) is not None:
        assert layers == {}
        assert least_psnr(got, want) >= 50
        return
    found = least_psnr(got, want)
    print(f"float8 file beside its expanded weights: {found}")
    assert found > 15
    out = layers["transformer_blocks.0.image.out"]
    name = "transformer_blocks.0.attn.to_out.0"
    assert torch.equal(out.weight.cpu().view(torch.uint8), stored[f"{name}.weight"].view(torch.uint8))
    assert torch.equal(out.scale.cpu(), stored[f"{name}.scale_weight"].expand(len(out.weight), 1))
    assert not [path for path in layers if not path.startswith("transformer_blocks.")]


def test_a_float8_file_is_expanded_for_other_dtypes(tmp_path: Path) -> None:
    weights = {name: weight.float() for name, weight in folder_weights(DEMO_MODEL_PATH).items()}
    file = save(scaled_float8(weights, lambda name: True), tmp_path / "fp8.safetensors")
    images, layers = drawn(dtype="float32", transformer_file=str(file))
    assert layers == {}
    assert images.keys() == {request.request_id for request in REQUESTS[0]}
