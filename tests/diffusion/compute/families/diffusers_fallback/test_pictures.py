"""Through the runner, a picture is the one that diffusers' pipeline makes; a request leaves nothing behind."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, HeunDiscreteScheduler
from PIL import Image

from testbed.runner_driver import Drive, make_request, psnr, scheduler_of
from tests.diffusion.compute.families.diffusers_fallback.conftest import ModelOf, RunnerOf
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.catalog.whole_info import WholePipeline
from vllm_omni.diffusion.compute.families.diffusers_fallback.pipeline import DiffusersPipeline, PipelineCall
from vllm_omni.diffusion.compute.families.diffusers_fallback.signature import MAX_INTERLEAVED
from vllm_omni.diffusion.compute.step.pipeline import Picture
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import StepPlan
from vllm_omni.diffusion.messages.request import DiffusionRequest

# diffusers' own schedules of Stable Diffusion XL.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
PIPELINES = ("FluxPipeline", "StableDiffusion3Pipeline", "StableDiffusionXLPipeline")
PROMPT = "a red apple"
CPU = torch.device("cpu")
OLDER = WholePipeline("OlderPipeline", (), "callback", 1)
# Fields of a request that are arguments of the pipeline's call, too.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("FluxPipeline", {"guidance_scale": 3.5, "max_sequence_length": 64}),
    ("FluxPipeline", {"negative_prompt": "a blue car", "true_cfg_scale": 3.0, "width": 96, "max_sequence_length": 32}),
    ("FluxPipeline", {"sigmas": (1.0, 0.7, 0.2), "num_inference_steps": 3, "max_sequence_length": 64}),
    ("FluxPipeline", {"flow_shift": 3.0, "num_inference_steps": 3, "max_sequence_length": 64}),
    ("StableDiffusion3Pipeline", {"guidance_scale": 1.0, "flow_shift": 6.0, "max_sequence_length": 64}),
    ("StableDiffusion3Pipeline", {"guidance_scale": 5.0, "max_sequence_length": 64}),
    ("StableDiffusion3Pipeline", {"guidance_scale": 1.0, "height": 96, "max_sequence_length": 64}),
    ("StableDiffusion3Pipeline", {"negative_prompt": "a blue car", "guidance_scale": 4.0, "max_sequence_length": 64}),
    ("StableDiffusionXLPipeline", {"guidance_scale": 5.0, "num_inference_steps": 7}),
    ("StableDiffusionXLPipeline", {"negative_prompt": "a blue car", "guidance_scale": 4.0, "height": 72, "width": 96}),
    ("StableDiffusionXLPipeline", {"guidance_scale": 1.0, "num_inference_steps": 1}),
]

Oracle = Callable[..., np.ndarray]


def request_of(request_id: str, **fields: Any) -> DiffusionRequest:
    return make_request(request_id, PROMPT, **{"true_cfg_scale": 1.0, **fields})


@pytest.fixture(scope="module")
def oracle(model_of: ModelOf) -> Oracle:
    """oracle(class name, seed, **arguments): what diffusers alone makes."""

    @cache
    def load(name: str) -> Any:
        pipeline = DiffusionPipeline.from_pretrained(model_of(name), dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def run(name: str, seed: int, **arguments: Any) -> np.ndarray:
        values = {"height": 64, "width": 64, "num_inference_steps": 4, **arguments}
        if "sigmas" in values:
            values["sigmas"] = list(values["sigmas"])
        generator = torch.Generator("cpu").manual_seed(seed)
        with scheduler_of(pipeline := load(name), request_of("a", flow_shift=values.pop("flow_shift", None))):
            return np.array(pipeline(PROMPT, generator=generator, **values).images[0])

    return run


def test_slicing_keeps_the_picture_and_tiles_are_those_of_diffusers(model_of: ModelOf) -> None:
    model = str(model_of("StableDiffusion3Pipeline"))
    fields: dict[str, Any] = {"guidance_scale": 1.0, "max_sequence_length": 64}
    pictures = {}
    for name in ("plain", "vae_use_slicing", "vae_use_tiling"):
        settings: dict[str, Any] = {} if name == "plain" else {name: True}
        runner = ModelRunner(OmniDiffusionConfig(model=model, **settings), load_model_info(model))
        runner.start()
        drive = Drive(runner).run({0: [request_of("a", seed=3, **fields), request_of("b", seed=4, **fields)]})
        assert not drive.errors
        pictures[name] = [drive.images["a"], drive.images["b"]]
    assert np.array_equal(pictures["vae_use_slicing"], pictures["plain"])

    pipeline: Any = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_tiling()
    generator = torch.Generator("cpu").manual_seed(3)
    tiled = pipeline(PROMPT, height=64, width=64, num_inference_steps=4, generator=generator, **fields).images[0]
    assert psnr(pictures["vae_use_tiling"][0], np.array(tiled)) >= 60
    assert psnr(pictures["vae_use_tiling"][0], pictures["plain"][0]) < 60  # there are tiles at this size


def calls(runner: ModelRunner) -> dict[str, PipelineCall]:
    pipeline: Any = runner.pipeline
    assert isinstance(pipeline, DiffusersPipeline)
    return pipeline._calls


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_a_picture_is_diffusers_own(runner_of: RunnerOf, oracle: Oracle, name: str, fields: dict[str, Any]) -> None:
    drive = Drive(runner_of(name)).run({0: [request_of("a", seed=3, **fields)]})
    assert not drive.errors
    assert psnr(drive.images["a"], oracle(name, 3, **fields)) >= 60
    assert not calls(runner_of(name))


@pytest.mark.parametrize("name", PIPELINES)
def test_requests_under_way_do_not_touch_one_another(runner_of: RunnerOf, oracle: Oracle, name: str) -> None:
    """Other sizes, steps and seeds, each begun while the others stand between two steps."""
    wanted: dict[str, dict[str, Any]] = {
        "a": {"seed": 1, "guidance_scale": 5.0, "num_inference_steps": 6},
        "b": {"seed": 2, "guidance_scale": 1.0, "num_inference_steps": 3, "height": 96},
        "c": {"seed": 3, "guidance_scale": 2.0, "num_inference_steps": 4, "negative_prompt": "a blue car"},
    }
    if name != "StableDiffusionXLPipeline":
        wanted = {request_id: {**fields, "max_sequence_length": 64} for request_id, fields in wanted.items()}
        wanted["b"]["flow_shift"] = 2.0
    requests = [request_of(request_id, **fields) for request_id, fields in wanted.items()]
    drive = Drive(runner_of(name)).run({step: [request] for step, request in enumerate(requests)})
    assert not drive.errors
    for request_id, fields in wanted.items():
        assert psnr(drive.images[request_id], oracle(name, **fields)) >= 60
    assert not calls(runner_of(name))


def test_a_plan_makes_one_step(runner_of: RunnerOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding makes none, each plan makes one of one request, and the decode is a plan of its own."""
    runner = runner_of("StableDiffusionXLPipeline")
    pipeline: Any = runner.pipeline
    work: list[str] = []
    for module, name in ((pipeline.pipeline.text_encoder, "encode"), (pipeline.pipeline.unet, "step")):
        hook = module.register_forward_pre_hook(lambda *_, name=name: work.append(name))
        monkeypatch.setattr(module, "_hook", hook, raising=False)
    decode = pipeline.pipeline.vae.decode

    def noted_decode(*args: Any, **keywords: Any) -> Any:
        work.append("decode")
        return decode(*args, **keywords)

    monkeypatch.setattr(pipeline.pipeline.vae, "decode", noted_decode)
    seen = []
    for plan in (
        StepPlan(0, new_requests=[request_of("a", guidance_scale=1.0, num_inference_steps=2)], encode=["a"]),
        StepPlan(1, denoise=["a"]),
        StepPlan(2, denoise=["a"]),
        StepPlan(3, decode=["a"]),
    ):
        result = runner.execute(plan)
        assert not result.errors
        seen.append(list(work))
        work.clear()
    assert seen == [["encode"], ["step"], ["step"], ["decode"]]
    runner.execute(StepPlan(4, release=["a"]))
    for module in (pipeline.pipeline.text_encoder, pipeline.pipeline.unet):
        module._hook.remove()


def test_an_abort_ends_a_request_at_its_next_step(runner_of: RunnerOf, oracle: Oracle) -> None:
    runner = runner_of("FluxPipeline")
    fields: dict[str, Any] = {"guidance_scale": 3.5, "max_sequence_length": 64}
    requests = [request_of(name, seed=4, **fields) for name in "ab"]
    runner.execute(StepPlan(0, new_requests=requests, encode=["a", "b"]))
    runner.execute(StepPlan(1, denoise=["a", "b"]))
    aborted = calls(runner)["a"]
    assert aborted.is_alive
    runner.abort(["a"])
    assert runner.execute(StepPlan(2, denoise=["a", "b"])).advanced == ["b"]
    runner.execute(StepPlan(3, denoise=["b"], release=["a"]))
    assert not aborted.is_alive
    assert list(calls(runner)) == ["b"]
    runner.execute(StepPlan(4, denoise=["b"]))
    picture = runner.execute(StepPlan(5, decode=["b"])).images["b"]
    assert psnr(picture, oracle("FluxPipeline", 4, **fields)) >= 60
    runner.execute(StepPlan(6, release=["b"]))


def test_what_a_request_costs_is_measured(model_of: ModelOf) -> None:
    model = model_of("StableDiffusionXLPipeline")
    runner = ModelRunner(OmniDiffusionConfig(model=str(model)), load_model_info(str(model)))
    ready = runner.start()
    assert (ready.max_num_seqs, ready.max_running) == (1, MAX_INTERLEAVED)
    weights = sum(file.stat().st_size for file in model.glob("*/*.safetensors"))
    assert 0.9 * weights < ready.load_bytes <= weights
    assert ready.seconds_per_unit > 0
    assert ready.step_overhead_seconds >= 0
    assert ready.encode_units_per_token > 0
    assert ready.decode_units_per_token > 0
    assert not calls(runner)


def test_what_is_under_way_ends_with_its_runner(model_of: ModelOf) -> None:
    model = str(model_of("FluxPipeline"))
    runner = ModelRunner(OmniDiffusionConfig(model=model), load_model_info(model))
    runner.start()
    request = request_of("a", guidance_scale=3.5, max_sequence_length=64)
    runner.execute(StepPlan(0, new_requests=[request], encode=["a"]))
    call = calls(runner)["a"]
    assert call.is_alive
    del runner
    gc.collect()
    assert not call.is_alive


def test_a_request_that_fails_in_a_step_fails_alone(runner_of: RunnerOf, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of("StableDiffusion3Pipeline")
    fields: dict[str, Any] = {"guidance_scale": 1.0, "max_sequence_length": 64}
    runner.execute(StepPlan(0, new_requests=[request_of(n, **fields) for n in "ab"], encode=["a", "b"]))
    pipeline: Any = runner.pipeline
    scheduler = type(pipeline.pipeline.scheduler)
    step, is_first = scheduler.step, itertools.chain([True], itertools.repeat(False))
    monkeypatch.setattr(scheduler, "step", lambda *args, **more: 1 / 0 if next(is_first) else step(*args, **more))
    result = runner.execute(StepPlan(1, denoise=["a", "b"]))
    assert (list(result.errors), result.advanced) == (["a"], ["b"])
    assert list(calls(runner)) == ["b"]
    runner.execute(StepPlan(2, release=["a", "b"]))
    assert not calls(runner)


def test_what_the_pipeline_refuses_is_the_callers_mistake(runner_of: RunnerOf) -> None:
    request = request_of("a", guidance_scale=3.5, max_sequence_length=1000)
    errors = Drive(runner_of("FluxPipeline")).run({0: [request]}).errors
    assert errors["a"].kind == "invalid"
    assert "max_sequence_length" in errors["a"].message


def test_a_schedule_that_calls_the_model_more_often_is_spread_over_the_steps(model_of: ModelOf) -> None:
    """Heun's method calls it twice a step, but for the last."""
    pipeline: Any = DiffusionPipeline.from_pretrained(model_of("StableDiffusionXLPipeline"), dtype=torch.float32)
    pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    parameters = ("height", "width", "num_inference_steps", "guidance_scale")
    whole = WholePipeline("StableDiffusionXLPipeline", parameters, "callback_on_step_end", 1)
    call = PipelineCall(pipeline, whole, request_of("a", seed=3, guidance_scale=1.0, num_inference_steps=4), CPU)
    call.encode()
    assert [call.advance(step) for step in range(1, 5)] == [2, 2, 2, 1]
    generator = torch.Generator("cpu").manual_seed(3)
    expected = pipeline(PROMPT, height=64, width=64, num_inference_steps=4, guidance_scale=1.0, generator=generator)
    assert psnr(call.picture().pixels.numpy(), np.array(expected.images[0])) >= 60


class OlderPipeline:
    """Tells its steps by `callback`; makes `num_own_steps`, whatever it is asked for, with or without a bar."""

    def __init__(self, num_own_steps: int, has_bar: bool) -> None:
        self.components: dict[str, Any] = {}
        self._num_own_steps = num_own_steps
        self._has_bar = has_bar
        self.seen: list[str] = []

    def __call__(self, *, callback: Callable[..., None], callback_steps: int, **_: Any) -> SimpleNamespace:
        assert callback_steps == 1
        self.seen.append("text")
        steps = range(self._num_own_steps)
        for step in self.progress_bar(steps) if self._has_bar else steps:  # type: ignore[attr-defined]
            self.seen.append("step")
            callback(step, 0, None)
        self.seen.append("picture")
        return SimpleNamespace(images=[Image.new("RGB", (64, 48), "red")])


@pytest.mark.parametrize(
    ("num_own_steps", "has_bar", "steps_after"),
    [(4, True, [0, 1, 2, 3, 4]), (2, True, [0, 1, 1, 2, 2]), (4, False, [1, 1, 2, 3, 4]), (0, True, [0, 0, 0, 0, 0])],
)
def test_older_callbacks_and_other_numbers_of_steps(num_own_steps: int, has_bar: bool, steps_after: list[int]) -> None:
    """`steps_after`: the pipeline's own steps made after the encoding and after each of four planned steps."""
    pipeline = OlderPipeline(num_own_steps, has_bar)
    call = PipelineCall(pipeline, OLDER, request_of("a"), CPU)
    call.encode()
    counts = [pipeline.seen.count("step")]
    for step in range(1, 5):
        call.advance(step)
        counts.append(pipeline.seen.count("step"))
    assert counts == steps_after
    assert call.picture().pixels.shape == (48, 64, 3)
    assert pipeline.seen == ["text", *["step"] * num_own_steps, "picture"]


class CallbackFreePipeline:
    """Tells its steps by its progress bar alone: by its updates, or as it iterates."""

    def __init__(self, iterates: bool) -> None:
        self.components: dict[str, Any] = {}
        self._iterates = iterates
        self.made: list[str] = []
        """Shared by the copies that calls make of this pipeline."""

    def __call__(self, **arguments: Any) -> SimpleNamespace:
        assert "" not in arguments
        if self._iterates:
            for _ in self.progress_bar(range(4)):  # type: ignore[attr-defined]
                self.made.append("step")
        else:
            with self.progress_bar(total=4) as bar:  # type: ignore[attr-defined]
                for _ in range(4):
                    self.made.append("step")
                    bar.update()
        return SimpleNamespace(images=[Image.new("RGB", (64, 48), "red")])


@pytest.mark.parametrize("iterates", [False, True])
def test_without_a_callback_the_progress_bar_tells_the_steps(iterates: bool) -> None:
    pipeline = CallbackFreePipeline(iterates)
    call = PipelineCall(pipeline, replace(OLDER, step_callback=""), request_of("a"), CPU)
    call.encode()
    made = [len(pipeline.made)]
    for step in (1, 2):
        call.advance(step)
        made.append(len(pipeline.made))
    assert made == [0, 1, 2]
    call.cancel()
    assert (call.is_alive, len(pipeline.made)) == (False, 2)


def test_the_picture_may_be_in_another_field_of_the_output() -> None:
    class Singular(OlderPipeline):
        def __call__(self, **arguments: Any) -> SimpleNamespace:
            return SimpleNamespace(image=super().__call__(**arguments).images)

    call = PipelineCall(Singular(1, True), replace(OLDER, output_name="image"), request_of("a"), CPU)
    assert call.picture().pixels.shape == (48, 64, 3)


def test_a_call_runs_with_its_own_device_made_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas have a GPU each in one machine, and the current one is a matter of each thread."""
    current: dict[str, int | None] = {}

    @contextmanager
    def device_index(index: int | None) -> Iterator[None]:
        current[threading.current_thread().name] = index
        yield
        del current[threading.current_thread().name]

    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    call = PipelineCall(OlderPipeline(2, True), OLDER, request_of("a"), torch.device("cuda", 1))
    call.encode()
    assert current == {"pipeline-run": 1}
    call.picture()
    assert current == {}


def test_a_picture_of_another_size_is_not_delivered(runner_of: RunnerOf, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of("FluxPipeline")
    small = Picture(torch.zeros((64, 48, 3), dtype=torch.uint8), torch.tensor(True))
    monkeypatch.setattr(PipelineCall, "picture", lambda self: small)
    request = request_of("a", guidance_scale=3.5, max_sequence_length=64)
    drive = Drive(runner).run({0: [request]})
    assert "a" not in drive.images
    assert drive.errors["a"].message == "the pipeline makes 48x64 of size 64x64"
