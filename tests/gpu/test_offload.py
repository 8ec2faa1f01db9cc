"""Blocks that stream from host memory on a GPU: pictures, memory, copies beside the computing."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.gpu.models import write_model

from testbed.runner_driver import QUICK, Drive, make_request, psnr
from tests.diffusion.compute.families.test_layer_offload import FAMILIES, OFFLOAD, Model, models, offload_of
from tests.gpu.marks import COMPILES, NEEDS_GPU
from vllm_omni.diffusion.catalog.find_folder import DEMO_MODEL_PATH
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.offload.layer_offload import BLOCKS
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig

__all__ = ["models"]
pytestmark = [NEEDS_GPU, COMPILES]

PLAIN: dict[str, Any] = {"enforce_eager": True, "attention_backend": "sdpa"}
NUM_BLOCKS, NUM_TEXT_LAYERS = 8, 4
SIDE = 1024


@pytest.fixture(autouse=True)
def own_memory() -> None:
    """Memory of earlier tests is given back before one begins."""
    gc.collect()
    torch.cuda.empty_cache()


def assert_near(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray], least: float) -> None:
    assert got.keys() == wanted.keys()
    found = {name: psnr(got[name], picture) for name, picture in wanted.items()}
    print(found)
    assert min(found.values()) >= least


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_draws_the_same(name: str, models: Callable[[str], Model]) -> None:
    model = models(name)
    plain = model.draw(model.start(dtype="float32", **PLAIN))
    streamed = model.draw(model.start(dtype="float32", **PLAIN, **OFFLOAD))
    assert_near(streamed, plain, 50)


def test_the_demo_model_draws_the_same_in_float8() -> None:
    model = Model(
        DEMO_MODEL_PATH,
        [make_request(f"{n}", "a red apple", num_inference_steps=8, seed=n, height=128, width=128) for n in range(3)],
    )
    settings: dict[str, Any] = {"dtype": "bfloat16", "quantization": "fp8", **PLAIN}
    assert_near(model.draw(model.start(**settings, **OFFLOAD)), model.draw(model.start(**settings)), 35)


@pytest.mark.parametrize("name", ["pictures", "z_images"])
def test_compiled_blocks_stream(name: str, models: Callable[[str], Model], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = models(name)
    settings: dict[str, Any] = {"dtype": "float32", "kernels": "torch", "attention_backend": "sdpa"}
    compiled = model.draw(model.start(**settings, **OFFLOAD))
    assert "Block.before (" in caplog.text
    assert "without CUDA graphs" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert_near(compiled, model.draw(model.start(**settings, enforce_eager=True)), 50)


@pytest.fixture(scope="module")
def large_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_large_blocks(tmp_path_factory.mktemp("models"))


def write_large_blocks(folder: Path) -> Path:
    """Qwen-Image with blocks and layers of the published sizes, but few of them."""
    path = write_model("qwen-image", folder / "qwen-image", False)
    change(path / "transformer" / "config.json", num_layers=NUM_BLOCKS)
    change(path / "text_encoder" / "config.json", num_hidden_layers=NUM_TEXT_LAYERS)
    return path


def change(file: Path, **values: int) -> None:
    """Set keys of a config, where they are: at the top or in the section of the language model."""
    content = json.loads(file.read_text())
    section = content.get("text_config", content)
    section |= values
    if layer_types := section.get("layer_types"):
        section["layer_types"] = layer_types[:1] * values["num_hidden_layers"]
    file.write_text(json.dumps(content))


@dataclass
class Measured:
    """Memory and pictures of one start, and the runner while a test holds it."""

    runner: ModelRunner
    held_bytes: int
    """Memory in use after the start."""
    peak_bytes: int
    """Most memory in use while pictures were drawn."""
    pictures: dict[str, np.ndarray]


def measured(path: Path, **settings: Any) -> Measured:
    config = OmniDiffusionConfig(model=str(path), load_format="dummy", **PLAIN, **settings)
    runner = ModelRunner(config, load_model_info(str(path), "dummy"), options=QUICK)
    runner.start()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    request = make_request("a", negative_prompt=" ", height=SIDE, width=SIDE, num_inference_steps=4, seed=1)
    drive = Drive(runner).run({0: [request]})
    assert not drive.errors
    return Measured(runner, held, torch.cuda.max_memory_allocated(), drive.images)


def test_memory_falls_by_the_weights_that_stream_and_pictures_are_the_same(large_blocks: Path) -> None:
    plain = measured(large_blocks)
    wanted, held, peak = plain.pictures, plain.held_bytes, plain.peak_bytes
    del plain
    gc.collect()
    torch.cuda.empty_cache()
    streamed = measured(large_blocks, **OFFLOAD)
    offload = offload_of(streamed.runner)
    saved = offload.num_host_bytes - offload.num_slot_bytes
    assert saved > 4e9
    tolerance = 128 * 2**20 + 0.02 * saved
    assert abs(held - streamed.held_bytes - saved) < tolerance
    assert abs(peak - streamed.peak_bytes - saved) < tolerance
    assert_near(streamed.pictures, wanted, 35)


def test_blocks_stay_where_there_is_room(large_blocks: Path) -> None:
    kept = measured(large_blocks, enable_layerwise_offload=True)
    offload = offload_of(kept.runner)
    assert offload.num_resident_blocks == NUM_BLOCKS
    assert (offload.streams, offload.num_slot_bytes) == ({}, 0)


def test_copies_and_computing_go_on_at_the_same_time(large_blocks: Path) -> None:
    runner = measured(large_blocks, **OFFLOAD).runner
    offload, pipeline = offload_of(runner), runner.pipeline
    requests = [
        make_request(f"{n}", negative_prompt=" ", height=SIDE, width=SIDE, num_inference_steps=9, seed=n)
        for n in range(2)
    ]
    with torch.inference_mode():
        for request in requests:
            pipeline.check(request)
            pipeline.admit(request)
        states = [pipeline.encode(request) for request in requests]

        def step() -> None:
            pipeline.predict(states)

        with offload.paused():
            computing = milliseconds(step)
        copying, both = milliseconds(offload.copy_all), milliseconds(step)
    print(f"computing {computing:.1f} ms, copying {copying:.1f} ms, both {both:.1f} ms")
    assert both < 0.8 * (computing + copying)
    assert offload.streams.keys() >= {BLOCKS}


def milliseconds(run: Callable[[], object]) -> float:
    """Time on the device of the fastest of five runs after two more."""
    times: list[float] = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return min(times[2:])
