"""Components that take turns on a real GPU: the same pictures, memory given back, copies from pinned memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from testbed.runner_driver import Drive, psnr
from tests.diffusion.compute.offload.test_families import FAMILIES, start
from tests.gpu.marks import COMPILES, NEEDS_GPU
from vllm_omni.diffusion.compute.offload.turns import Turns

pytestmark = [NEEDS_GPU, COMPILES]

SETTINGS: dict[str, Any] = {"dtype": "float32", "attention_backend": "sdpa", "progress_bar": False}
MIB = 2**20


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [*((name, "triton") for name in ("qwen_image", "edit", "z_image", "i2v-2.1", "t2v-a14b")), ("qwen_image", "torch")],
)
def test_pictures_are_the_same_with_one_component_at_a_time(tmp_path: Path, name: str, kernels: str) -> None:
    """With `torch` the blocks are compiled: their code must not depend on the places of weights."""
    family = FAMILIES[name]
    path = family.build(tmp_path / "model")
    arrivals = family.arrivals(path)
    settings = SETTINGS | {"kernels": kernels}
    wanted = Drive(start(path, **settings)).run(arrivals)
    assert wanted.errors == {}
    runner = start(path, 1, enable_cpu_offload=True, **settings)
    found = Drive(runner).run(arrivals)
    assert found.errors == {}
    decibels = {i: psnr(found.images[i], picture) for i, picture in wanted.images.items()}
    print(name, kernels, decibels)
    assert min(decibels.values()) >= 60
    pipeline: Any = runner.pipeline
    assert len(pipeline.turns.residency.present) == 1


def test_a_component_takes_its_bytes_while_it_is_there_and_gives_all_back() -> None:
    device = torch.device("cuda", 0)
    turns = Turns(device, is_on=True)
    modules = {}
    for name, size in (("text_encoder", 4096), ("transformer", 8192), ("vae", 1024)):
        with torch.device("meta"):
            modules[name] = nn.Linear(size, size, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        place = turns.rest(name)
        assert place is not None
        place(modules[name])
        modules[name].weight.fill_(1 / size)
    turns.begin(140 * MIB)  # the transformer has 128 MiB, the text encoder 32, the VAE 2
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for name, expected in (("text_encoder", 32), ("transformer", 128), ("vae", 130), ("text_encoder", 34)):
        module = modules[name]
        with turns.use(name):
            x = torch.ones(2, module.in_features, dtype=torch.bfloat16, device=device)
            assert torch.equal(module(x), torch.ones(2, module.out_features, dtype=torch.bfloat16, device=device))
        del x
        torch.cuda.synchronize()
        # cuBLAS keeps a workspace of its own from the first product on.
        assert abs(torch.cuda.memory_allocated() - allocated - expected * MIB) <= 80 * MIB
        assert turns.residency.num_bytes == expected * MIB
    turns.release_memory()
    assert torch.cuda.memory_allocated() - allocated <= 80 * MIB
    assert torch.cuda.memory_reserved() - reserved <= 100 * MIB
    for name in modules:
        assert all(run.is_pinned() for run in turns._components[name].host)


def test_a_copy_comes_at_the_rate_of_the_link() -> None:
    device = torch.device("cuda", 0)
    turns = Turns(device, is_on=True)
    module = nn.Linear(2**15, 2**14, bias=False, dtype=torch.bfloat16, device=device).requires_grad_(False)
    turns.keep("transformer", [module])
    turns.begin(2**40)
    seconds = []
    for _ in range(3):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        turns.release_memory()
        start_event.record()
        with turns.use("transformer"):
            end_event.record()
        torch.cuda.synchronize()
        seconds.append(start_event.elapsed_time(end_event) / 1000)
    size = turns.residency.sizes["transformer"]
    print(f"{size / 2**30:.1f} GiB in {min(seconds):.3f} s: {size / min(seconds) / 1e9:.1f} GB/s")
    assert turns.num_copied_bytes == 3 * size
