"""The warm-up compiles all code that serving needs, with step caches, edits and ranks; a failure ends the start."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from testbed.runner_driver import QUICK, Drive, fitted, make_request, psnr
from testbed.tiny_models import build_tiny_qwen_image, photo
from testbed.tiny_wan import build_tiny_wan
from testbed.tiny_z_image import build_tiny_z_image
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.worker.replica import merging
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.families.qwen_image.transformer import QwenImageTransformer
from vllm_omni.diffusion.compute.families.z_image.transformer import ZImageTransformer
from vllm_omni.diffusion.compute.step.compiled import Backend, CompiledBlocks
from vllm_omni.diffusion.compute.worker.main import CODE_FOLDERS, keep_compiled_code
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.diffusion.messages.worker import RankInfo
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.images import prepare_image

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
Arrivals = Mapping[int, Sequence[DiffusionRequest]]
Images = dict[str, np.ndarray]
ARRIVALS: Arrivals = {
    0: [make_request("long", negative_prompt="a blue car", num_inference_steps=12, seed=3)],
    2: [
        make_request("wide", "a photo", height=48, width=96, num_inference_steps=9, true_cfg_scale=1.0, seed=4),
        make_request("short", "", negative_prompt=" ", height=16, width=16, seed=5),
    ],
}
CACHES: dict[str, dict[str, Any]] = {
    "none": {},
    "cache_dit": {"residual_diff_threshold": 0.3, "max_warmup_steps": 2, "Bn_compute_blocks": 1},
}


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    logging.getLogger("torch.__trace").setLevel(logging.WARNING)
    compile_with("aot_eager", monkeypatch)


def compile_with(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile with a faster `backend` than the default, which makes machine code."""
    for cls in (QwenImageTransformer, ZImageTransformer):
        monkeypatch.setattr(cls.compile_blocks, "__defaults__", (backend,))


def draw(
    path: Path,
    arrivals: Arrivals,
    compile_blocks: bool,
    rank_info: RankInfo | None = None,
    parallel: DiffusionParallelConfig = DiffusionParallelConfig(),  # noqa: B008 - frozen
    cache: str = "none",
    **cache_keys: Any,
) -> tuple[Images, int]:
    """Pictures, and the number of steps that a cache skipped."""
    config = OmniDiffusionConfig(
        model=str(path),
        parallel=parallel,
        cache_backend=cache,
        cache_config=CACHES[cache] | cache_keys,
    )
    runner = ModelRunner(config, load_model_info(str(path)), rank_info, replace(QUICK, compile_blocks=compile_blocks))
    runner.start()
    merge, skipped = merging(runner), 0.0

    def watch(result: Any) -> Any:
        nonlocal skipped
        result = merge(result)
        skipped += sum(result.cached.values())
        return result

    drive = Drive(runner, merge=watch).run(arrivals)
    assert drive.errors == {}
    return drive.images, round(skipped)


def check(compiled: Images, eager: Images) -> None:
    assert compiled.keys() == eager.keys()
    for request_id, picture in eager.items():
        assert psnr(compiled[request_id], picture) >= 60


def check_log(caplog: pytest.LogCaptureFixture, wanted: str) -> None:
    assert wanted in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING], "something was compiled while serving"


@pytest.mark.parametrize("cache", [pytest.param("none", marks=pytest.mark.thorough), "cache_dit"])
def test_serving_qwen_image_compiles_nothing(cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = build_tiny_qwen_image(tmp_path / "model", layers=4, heads=4, time_scale=0.1)
    compiled, skipped = draw(model, ARRIVALS, compile_blocks=True, cache=cache)
    check_log(caplog, "compiled QwenImageBlock.before (3 variants), QwenImageBlock.after (3 variants) in ")
    eager, skipped_eagerly = draw(model, ARRIVALS, compile_blocks=False, cache=cache)
    check(compiled, eager)
    assert skipped == skipped_eagerly
    assert (skipped > 2) == (cache != "none"), "a cache that skips nothing proves nothing"


@pytest.mark.thorough
def test_serving_z_image_compiles_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = build_tiny_z_image(tmp_path / "model", heads=4, time_scale=0.02)
    compiled, skipped = draw(model, ARRIVALS, compile_blocks=True, cache="cache_dit", residual_diff_threshold=0.6)
    check_log(caplog, "compiled ZImageBlock.before (2 variants), ZImageBlock.after (2 variants) in ")
    eager, skipped_eagerly = draw(model, ARRIVALS, compile_blocks=False, cache="cache_dit", residual_diff_threshold=0.6)
    check(compiled, eager)
    assert skipped == skipped_eagerly > 2


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["t2v-a14b", "ti2v-5b"])
def test_serving_wan_compiles_nothing(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two transformers share the code; a given first frame is a second row of its sequence."""
    caplog.set_level(logging.INFO)
    defaults: dict[str, object] = {"height": 64, "width": 64, "num_frames": 5}
    model = build_tiny_wan(
        tmp_path / "model", kind, heads=4, layers=4, time_scale=0.02, default_sampling_params=defaults
    )
    common: dict[str, Any] = {"num_frames": 5, "max_sequence_length": 16}
    arrivals: dict[int, list[DiffusionRequest]] = {
        0: [make_request("long", negative_prompt="a blue car", num_inference_steps=12, **common)],
        2: [make_request("picture", true_cfg_scale=1.0, num_inference_steps=9, max_sequence_length=16)],
    }
    info = load_model_info(str(model))
    if info.image_input is not None:
        images = (prepare_image(photo(90, 60, 0), info.image_input.sizes),)
        animated = make_request("animated", negative_prompt="", images=images, num_inference_steps=6, **common)
        arrivals[4] = [fitted(animated, info)]
    settings: dict[str, Any] = {"cache": "cache_dit", "residual_diff_threshold": 0.6}
    compiled, skipped = draw(model, arrivals, compile_blocks=True, **settings)
    parts = ", ".join(f"WanBlock.{part} (2 variants)" for part in ("before", "between", "after"))
    check_log(caplog, f"compiled {parts} in ")
    eager, skipped_eagerly = draw(model, arrivals, compile_blocks=False, **settings)
    check(compiled, eager)
    assert skipped == skipped_eagerly > 2


@pytest.mark.thorough
def test_serving_edits_compiles_nothing(tiny_edit_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    edit = load_model_info(str(tiny_edit_model)).image_input
    assert edit is not None
    one, two = (prepare_image(photo(*size, seed), edit.sizes) for seed, size in enumerate([(90, 60), (31, 70)]))
    arrivals = {
        0: [make_request("one", images=(one,), true_cfg_scale=1.0)],
        1: [make_request("two", negative_prompt="", height=32, images=(two, one))],
    }
    compiled, _ = draw(tiny_edit_model, arrivals, compile_blocks=True)
    check_log(caplog, "compiled QwenImageBlock.before (2 variants), QwenImageBlock.after (2 variants) in ")
    check(compiled, draw(tiny_edit_model, arrivals, compile_blocks=False)[0])


def draw_as_rank(rank_info: RankInfo, path: Path, parallel: DiffusionParallelConfig) -> tuple[Images, list[str]]:
    torch.set_num_threads(1)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger("vllm_omni")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    images, _ = draw(path, ARRIVALS, True, rank_info, parallel)
    return images, lines


@pytest.mark.parametrize(
    ("parallel", "parts"),
    [
        pytest.param(
            DiffusionParallelConfig(ulysses_degree=2, cfg_parallel_size=2),
            "before (3 variants), QwenImageBlock.after (3 variants)",
            marks=pytest.mark.layouts,
        ),
        # Under tensor parallelism what comes after attention holds exchanges between ranks.
        (DiffusionParallelConfig(tensor_parallel_size=2), "before (3 variants)"),
    ],
)
def test_ranks_compile_the_same(parallel: DiffusionParallelConfig, parts: str, tmp_path: Path) -> None:
    model = build_tiny_qwen_image(tmp_path / "model", heads=4)
    eager, _ = draw(model, ARRIVALS, compile_blocks=False)
    for images, lines in run_places(draw_as_rank, parallel, model, parallel):
        check(images, eager)
        assert [line for line in lines if line.startswith("WARNING")] == []
        assert any(f"compiled QwenImageBlock.{parts} in " in line for line in lines)


def test_a_failed_compilation_ends_the_start_and_names_enforce_eager(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise ValueError("no compiler for you")

    compile_with(fails, monkeypatch)
    with pytest.raises(ConfigError, match=r"ValueError: no compiler for you; --enforce-eager serves without") as caught:
        draw(tiny_model, {}, compile_blocks=True)
    assert "\n" not in str(caught.value)


def test_the_device_and_enforce_eager_decide(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[CompiledBlocks] = []
    compile_blocks = QwenImageTransformer.compile_blocks

    def watched(self: QwenImageTransformer, **others: Any) -> CompiledBlocks:
        compiled.append(compile_blocks(self, **others))
        return compiled[-1]

    monkeypatch.setattr(QwenImageTransformer, "compile_blocks", watched)

    def start(**settings: Any) -> bool:
        compiled.clear()
        config = OmniDiffusionConfig(model=str(tiny_model), **settings)
        ModelRunner(config, load_model_info(str(tiny_model)), options=QUICK).start()
        return bool(compiled)

    assert not Device("cpu").is_worth_compiling_for
    assert not start()
    monkeypatch.setattr(Device, "is_worth_compiling_for", True)
    assert start()
    assert not start(enforce_eager=True)


@pytest.mark.parametrize(
    ("environment", "folders"),
    [
        ({}, ["/home/omni/.cache/vllm/omni_torch_compile", "/home/omni/.cache/vllm/omni_triton"]),
        ({"XDG_CACHE_HOME": "/cache"}, ["/cache/vllm/omni_torch_compile", "/cache/vllm/omni_triton"]),
        (
            {"XDG_CACHE_HOME": "/cache", "VLLM_CACHE_ROOT": "~/vllm"},
            ["/home/omni/vllm/omni_torch_compile", "/home/omni/vllm/omni_triton"],
        ),
        ({"VLLM_CACHE_ROOT": "/vllm", "TORCHINDUCTOR_CACHE_DIR": "/mine"}, ["/mine", "/vllm/omni_triton"]),
        ({"VLLM_CACHE_ROOT": "/vllm", "TRITON_CACHE_DIR": "/mine"}, ["/vllm/omni_torch_compile", "/mine"]),
    ],
)
def test_compiled_code_is_kept_beside_vllms(
    environment: dict[str, str], folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "VLLM_CACHE_ROOT", *CODE_FOLDERS):
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment | {"HOME": "/home/omni"}).items():
        monkeypatch.setenv(name, value)
    keep_compiled_code()
    assert [os.environ.pop(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")] == folders
