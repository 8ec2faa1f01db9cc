"""Steps with LoRA adapters: grouped kernels and CUDA graphs draw what PyTorch draws kernel by kernel."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from testbed.runner_driver import make_request, psnr
from testbed.tiny_adapters import random_pairs, save_peft, transformer_of
from tests.diffusion.compute.families.test_cuda_graphs import BUILDERS
from tests.gpu.captures import Replays, dtype_for, model_of
from tests.gpu.marks import COMPILES, NEEDS_GPU
from vllm_omni.diffusion.messages.request import LoRA

pytestmark = [NEEDS_GPU, COMPILES]


@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("family", [*BUILDERS, "demo"])
def test_grouped_kernels_and_cuda_graphs_draw_the_same(
    tmp_path: Path, family: str, quantization: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_of(family, tmp_path / "model", quantization)
    transformer = transformer_of(path)
    loras = [
        LoRA(
            f"{rank}",
            str(save_peft(random_pairs(transformer, rank, rank, size), tmp_path / f"{rank}.safetensors")),
            1.0,
        )
        for rank, size in ((16, 0.3), (5, 0.3), (40, 0.1))
    ]
    # One request alone, then one with two adapters, then one without.
    arrivals = {
        0: [make_request("a", negative_prompt="", num_inference_steps=9, seed=1, loras=tuple(loras[:1]))],
        3: [make_request("b", height=48, width=80, num_inference_steps=6, seed=2, loras=tuple(loras[1:]))],
        5: [make_request("c", height=96, negative_prompt=" ", num_inference_steps=4, seed=3)],
    }
    replays = Replays.counted(monkeypatch)
    draw = partial(replays.draw, path, arrivals, dtype=dtype_for(quantization), quantization=quantization)
    wanted = draw(kernels="torch", enforce_eager=True)
    eager = draw(enforce_eager=True)
    assert replays.num == 0
    captured = draw()
    assert replays.num > 0
    # Float8 rounds coarsely, and each start chooses its attention backend by speed.
    for name, drive, expected, limit in (
        ("grouped", eager, wanted, 25 if quantization else 50),
        ("captured", captured, eager, 25 if quantization else 50),
    ):
        found = [psnr(drive.images[i], picture) for i, picture in expected.images.items()]
        print(f"{family} {quantization} {name}: {found}")
        assert min(found) >= limit
