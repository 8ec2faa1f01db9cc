"""ModelRunner: mixed packs, errors, aborts, previews, and the state that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from testbed.runner_driver import QUICK, Drive, kept, make_request, psnr
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.attention import BACKENDS
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.families.qwen_image.text import QwenImageTextEncoder
from vllm_omni.diffusion.compute.step.pipeline import RequestState
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import StepPlan
from vllm_omni.errors import ConfigError

REQUESTS = [
    make_request("a", "a red apple", negative_prompt="", seed=1),
    make_request("b", "a blue car", height=48, width=80, seed=2),
    make_request("c", "a photo of a car", negative_prompt="apple", true_cfg_scale=2.0, seed=3),
]


@pytest.fixture(scope="module")
def runner(tiny_model: Path) -> Iterator[ModelRunner]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runner = ModelRunner(OmniDiffusionConfig(model=str(tiny_model)), load_model_info(str(tiny_model)), options=QUICK)
    assert runner.start().attention_backend in BACKENDS
    yield runner
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(runner: ModelRunner) -> dict[str, np.ndarray]:
    """Each picture, made without other requests."""
    return {r.request_id: Drive(runner).run({0: [r]}).images[r.request_id] for r in REQUESTS}


def test_an_attention_backend_that_does_not_run_ends_the_start(tiny_model: Path) -> None:
    config = OmniDiffusionConfig(model=str(tiny_model), attention_backend="cudnn", dtype="float32")
    with pytest.raises(ConfigError, match=r"--attention-backend takes sdpa.* here, got cudnn"):
        ModelRunner(config, load_model_info(str(tiny_model))).start()


def test_other_requests_in_the_pack_do_not_change_a_picture(runner: ModelRunner, alone: dict[str, np.ndarray]) -> None:
    together = Drive(runner).run({0: REQUESTS[:1], 1: REQUESTS[1:2], 2: REQUESTS[2:]})
    for request_id, picture in alone.items():
        assert psnr(picture, together.images[request_id]) >= 60
    assert kept(runner) == 0


def test_a_step_of_mixed_requests_is_one_forward(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards: list[int] = []
    original = runner.pipeline.predict

    def counting(states: Sequence[RequestState], groups: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
        forwards.append(len(states))
        return original(states, groups)

    monkeypatch.setattr(runner.pipeline, "predict", counting)
    Drive(runner).run({0: REQUESTS[:1], 1: REQUESTS[1:2], 2: REQUESTS[2:]})
    assert forwards == [1, 2, 3, 3, 2, 1]


def test_the_rates_are_measured(tiny_model: Path) -> None:
    config = OmniDiffusionConfig(model=str(tiny_model), max_batch_tokens=77)
    ready = ModelRunner(config, load_model_info(str(tiny_model))).start()
    assert ready.max_batch_tokens == 77
    assert (ready.device, ready.dtype) == ("cpu", "float32")
    weights = sum(f.stat().st_size for f in tiny_model.glob("*/*.safetensors"))
    assert 0.9 * weights < ready.load_bytes <= weights
    assert ready.load_seconds > 0
    assert ready.seconds_per_unit > 0
    assert ready.step_overhead_seconds >= 0
    assert ready.encode_units_per_token > 0
    assert ready.decode_units_per_token > 0
    assert ready.peak_memory_bytes > 2**20


def test_step_caches_get_a_quarter_of_the_free_memory(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "free_memory_bytes", lambda self: 2**32)
    cached = ModelRunner(OmniDiffusionConfig(model=str(tiny_model)), load_model_info(str(tiny_model)), options=QUICK)
    cached.start()
    assert cached.pipeline.step_cache.budget.max_bytes == 2**30


def test_previews_come_near_the_picture(runner: ModelRunner) -> None:
    request = make_request("p", num_inference_steps=5, preview_steps=(2, 5))
    drive = Drive(runner).run({0: [request]})
    early, last = drive.previews["p"]
    assert early.shape == (64, 64, 3)
    # The schedule ends at sigma 0, so the prediction of the last step is the picture itself.
    assert psnr(last, drive.images["p"]) >= 60
    assert psnr(early, drive.images["p"]) < psnr(last, drive.images["p"])


def test_overlapped_decode_is_refused_on_a_cpu(tiny_model: Path) -> None:
    config = OmniDiffusionConfig(model=str(tiny_model), device="cpu", overlap_decode=True)
    with pytest.raises(ConfigError, match=r"^--overlap-decode takes a GPU, got cpu, which decodes between steps$"):
        ModelRunner(config, load_model_info(str(tiny_model))).start()


def test_a_result_may_be_read_after_its_requests_were_released(
    runner: ModelRunner, alone: dict[str, np.ndarray]
) -> None:
    steps = [StepPlan(i + 1, denoise=["b"]) for i in range(REQUESTS[1].num_inference_steps)]
    last = len(steps) + 1
    plans = [StepPlan(0, new_requests=[REQUESTS[1]], encode=["b"]), *steps, StepPlan(last, decode=["b"])]
    waits = [runner.launch(plan) for plan in [*plans, StepPlan(last + 1, release=["b"])]]
    results = [wait() for wait in waits]
    assert psnr(results[last].images["b"], alone["b"]) >= 60


Poison = Callable[[str, str, Exception], None]


@pytest.fixture
def poison(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> Poison:
    """poison(stage, request id, error): make a stage of the pipeline raise whenever the request takes part."""

    def inject(stage: str, request_id: str, error: Exception) -> None:
        original = getattr(runner.pipeline, stage)

        def failing(subject: Any, *rest: Any) -> Any:
            members: Sequence[Any] = subject if isinstance(subject, Sequence) else [subject]
            ids = [m.request.request_id if isinstance(m, RequestState) else m.request_id for m in members]
            if request_id in ids:
                raise error
            return original(subject, *rest)

        monkeypatch.setattr(runner.pipeline, stage, failing)

    return inject


@pytest.mark.parametrize("stage", ["encode", "predict", "advance", "decode"])
def test_a_failing_request_fails_alone(
    runner: ModelRunner, alone: dict[str, np.ndarray], poison: Poison, stage: str
) -> None:
    poison(stage, "b", RuntimeError("poisoned"))
    drive = Drive(runner).run({0: REQUESTS})
    assert set(drive.images) == {"a", "c"}
    assert psnr(alone["a"], drive.images["a"]) >= 60
    assert psnr(alone["c"], drive.images["c"]) >= 60
    error = drive.errors["b"]
    assert (error.message, error.kind) == ("poisoned", "internal")
    assert "RuntimeError" in error.traceback
    assert kept(runner) == 0


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 7")]
)
def test_running_out_of_memory_is_recognised(runner: ModelRunner, poison: Poison, error: Exception) -> None:
    poison("predict", "a", error)
    assert Drive(runner).run({0: REQUESTS[:2]}).errors["a"].kind == "out_of_memory"


def test_an_aborted_request_is_skipped_and_forgotten(runner: ModelRunner, alone: dict[str, np.ndarray]) -> None:
    runner.execute(StepPlan(0, new_requests=list(REQUESTS[:2]), encode=["a", "b"]))
    runner.execute(StepPlan(1, denoise=["a", "b"]))
    runner.abort(["b", "never seen"])
    result = runner.execute(StepPlan(2, denoise=["a", "b"], preview=["b"]))
    assert result.advanced == ["a"]
    assert result.num_sequences == 2
    assert (result.previews, result.errors) == ({}, {})
    assert runner.execute(StepPlan(3, decode=["b"])).images == {}
    # The plan that announces a request may come after its abort.
    num_kept = kept(runner)
    assert runner.execute(StepPlan(4, new_requests=[make_request("never seen")], encode=["never seen"])).errors == {}
    assert kept(runner) == num_kept + 1, "the request, and no state"
    assert runner.execute(StepPlan(5, denoise=["never seen"])).advanced == []
    runner.execute(StepPlan(6, release=["a", "b", "never seen"]))
    assert kept(runner) == 0
    # A released id may come back: a replay.
    assert psnr(Drive(runner).run({0: [REQUESTS[1]]}).images["b"], alone["b"]) >= 60


def test_unknown_ids_are_skipped(runner: ModelRunner) -> None:
    result = runner.execute(StepPlan(0, encode=["x"], decode=["y"], release=["v"]))
    assert (result.errors, result.advanced, result.images) == ({}, [], {})
    assert runner.execute(StepPlan(1, denoise=["z"], preview=["z"])).advanced == []


def test_a_prompt_seen_before_is_not_encoded_again(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    original = QwenImageTextEncoder.__call__

    def encode(encoder: QwenImageTextEncoder, prompt: str) -> Tensor:
        encoded.append(prompt)
        return original(encoder, prompt)

    monkeypatch.setattr(QwenImageTextEncoder, "__call__", encode)
    for seed in range(3):
        Drive(runner).run({0: [make_request("x", "a new prompt", negative_prompt="another new one", seed=seed)]})
    assert sorted(encoded) == ["a new prompt", "another new one"]
