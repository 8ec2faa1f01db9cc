"""Noise schedules: steps of diffusers' own schedulers, one scheduler a request, without reads from the device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from testbed.fakes import make_config, make_request
from tests.diffusion.control.builders import INFO
from tests.fake_gpu import FAKE_GPU, FakeGpu
from vllm_omni.diffusion.catalog.configs import MIN_FLOW_SHIFT, SchedulerConfig, UniPCConfig, read_own_schedule
from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.families.component_loader import ComponentLoader
from vllm_omni.diffusion.compute.step.sampling import predict_clean
from vllm_omni.diffusion.compute.step.schedule import make_schedule, with_one_step_schedules
from vllm_omni.diffusion.compute.step.unipc import FlowUniPC
from vllm_omni.diffusion.control.request_builder import MAX_FLOW_SHIFT
from vllm_omni.errors import ConfigError, InvalidRequestError

UNIPC: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
TEMPLATES = {
    "unipc": (FlowUniPC(**UNIPC), UniPCMultistepScheduler(**UNIPC)),
    "unipc-order-1": (FlowUniPC(**UNIPC, solver_order=1), UniPCMultistepScheduler(**UNIPC, solver_order=1)),
    "euler": (FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)),
}
NUM_STEPS = (1, 2, 5, 20)


def velocity(latents: Tensor, step: int) -> Tensor:
    """Stand-in for a transformer: depends on the latents and on the step."""
    return torch.sin(3 * latents + step) + 0.3 * latents


def noise(seed: int, shape: tuple[int, ...] = (15, 8)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped_alone(scheduler: Any, latents: Tensor, **timesteps: Any) -> Tensor:
    """diffusers' scheduler over all its steps. It takes [batch, channels, ...]."""
    scheduler.set_timesteps(**timesteps)
    scheduler.set_begin_index(0)
    latents = latents[None]
    for step, timestep in enumerate(scheduler.timesteps):
        latents = scheduler.step(velocity(latents, step), timestep, latents, return_dict=False)[0]
    return latents[0]


@pytest.mark.parametrize("name", TEMPLATES)
@torch.inference_mode()
def test_interleaved_requests_step_as_diffusers_steps_each_alone(name: str) -> None:
    ours, theirs = TEMPLATES[name]
    template = with_one_step_schedules(ours)
    schedulers = [make_schedule(template, make_request(steps=steps)) for steps in NUM_STEPS]
    latents = [noise(seed) for seed in NUM_STEPS]
    for step in range(max(NUM_STEPS)):
        for i, scheduler in enumerate(schedulers):
            if step < NUM_STEPS[i]:
                moved = scheduler.step(velocity(latents[i], step), scheduler.timesteps[step], latents[i])
                latents[i] = moved.prev_sample
    for steps, made in zip(NUM_STEPS, latents):
        expected = stepped_alone(theirs, noise(steps), num_inference_steps=steps)
        assert expected.abs().max() > 0.1
        assert torch.equal(made, expected), steps


@torch.inference_mode()
def test_order_3_steps_as_diffusers_up_to_rounding() -> None:
    """diffusers adds the differences up by a matrix product, whose order of additions is another."""
    scheduler = make_schedule(FlowUniPC(**UNIPC, solver_order=3), make_request(steps=12))
    latents = noise(1)
    for step, timestep in enumerate(scheduler.timesteps):
        latents = scheduler.step(velocity(latents, step), timestep, latents).prev_sample
    expected = stepped_alone(UniPCMultistepScheduler(**UNIPC, solver_order=3), noise(1), num_inference_steps=12)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["unipc", "euler"])
def test_shift_and_sigmas_of_a_request(name: str) -> None:
    ours, theirs = TEMPLATES[name]
    key = "shift" if name == "euler" else "flow_shift"
    shifted = type(theirs).from_config(theirs.config, **{key: 5.0})
    made = make_schedule(with_one_step_schedules(ours), make_request(steps=4, flow_shift=5.0))
    shifted.set_timesteps(num_inference_steps=4)
    assert torch.equal(made.sigmas, shifted.sigmas)
    assert torch.equal(made.timesteps, shifted.timesteps)
    sigmas = (1.0, 0.6, 0.2)
    made = make_schedule(with_one_step_schedules(ours), make_request(steps=3, sigmas=sigmas, flow_shift=5.0))
    shifted.set_timesteps(sigmas=np.array(sigmas))
    assert torch.equal(made.sigmas, shifted.sigmas)
    unshifted = make_schedule(with_one_step_schedules(ours), make_request(steps=3, sigmas=sigmas))
    assert not torch.equal(made.sigmas, unshifted.sigmas), "the template keeps its own shift"


@pytest.mark.parametrize("shift", [3.0, 0.5])
@pytest.mark.parametrize("sigmas", [None, (1.0, 0.6, 0.2)])
def test_a_shift_replaces_the_one_by_size_as_distilled_adapters_ask_for_it(
    shift: float, sigmas: tuple[float, ...] | None
) -> None:
    """diffusers' schedule with equal bounds of the dynamic shift and without a terminal is that of a static shift."""
    own = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
    template = with_one_step_schedules(FlowMatchEulerDiscreteScheduler(**own, shift_terminal=0.02))
    request = make_request(steps=3, sigmas=sigmas, flow_shift=shift)
    made = make_schedule(template, request, 64)
    levels = np.linspace(1.0, 1 / 3, 3) if sigmas is None else np.array(sigmas)
    published = FlowMatchEulerDiscreteScheduler(**own | dict.fromkeys(("base_shift", "max_shift"), np.log(shift)))
    published.set_timesteps(sigmas=levels, mu=np.log(shift))
    static = FlowMatchEulerDiscreteScheduler(shift=shift)
    static.set_timesteps(sigmas=levels)
    for name in ("sigmas", "timesteps"):
        assert torch.equal(getattr(made, name), getattr(static, name))
        torch.testing.assert_close(getattr(made, name), getattr(published, name), rtol=1e-6, atol=0)
    larger = make_schedule(template, request, 4096)
    assert torch.equal(larger.sigmas, made.sigmas), "the size has no effect"
    # The terminal belongs to the shift by size: with it, another schedule ends at 0.02.
    assert float(make_schedule(template, make_request(steps=3), 64).sigmas[-2]) == pytest.approx(0.02)
    assert float(made.sigmas[-2]) > 0.05
    assert make_schedule(template, make_request(steps=1, flow_shift=shift), 64).sigmas.tolist() == [1.0, 0.0]


def test_a_scheduler_without_a_shift_is_named() -> None:
    with pytest.raises(InvalidRequestError, match=r"^flow_shift 5: .* EulerDiscreteScheduler has no shift$") as caught:
        make_schedule(EulerDiscreteScheduler(), make_request(flow_shift=5.0))
    assert caught.value.param == "flow_shift"


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"sigmas": (0.5, 0.5 - 1e-12)}, "sigmas", r"sigmas \(.*\) makes .* noise levels that do not fall"),
        ({"sigmas": (1.0, 0.9999999)}, "sigmas", r"sigmas \(.*\) makes .* noise levels that do not fall"),
        ({"flow_shift": 1e-20}, "flow_shift", "flow_shift 1e-20 makes .* values that are not numbers, by FlowUniPC"),
        (
            {"flow_shift": 5.0, "sigmas": (0.5, 0.5 - 1e-12)},
            "sigmas",
            r"sigmas \(.*\) and flow_shift 5\.0 make .* noise levels that do not fall",
        ),
    ],
)
def test_a_schedule_that_cannot_be_stepped_names_what_decided_it(
    given: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{message}$") as caught:
        make_schedule(FlowUniPC(**UNIPC), make_request(steps=2, **given))
    assert caught.value.param == param


def test_euler_takes_equal_levels() -> None:
    make_schedule(FlowMatchEulerDiscreteScheduler(), make_request(steps=2, sigmas=(0.5, 0.5 - 1e-12)))


@pytest.mark.parametrize("shift", [MIN_FLOW_SHIFT, MAX_FLOW_SHIFT])
def test_the_bounds_of_the_shift_make_schedules_that_can_be_stepped(shift: float) -> None:
    for steps in (1, 2, 50, 100):
        make_schedule(FlowUniPC(**UNIPC), make_request(steps=steps, flow_shift=shift))


@torch.inference_mode()
def test_the_clean_latents_are_those_that_the_scheduler_foresees() -> None:
    scheduler = make_schedule(FlowUniPC(**UNIPC), make_request(steps=3))
    latents = noise(1)
    for step, timestep in enumerate(scheduler.timesteps):
        direction = velocity(latents, step)
        clean = predict_clean(latents, direction, float(scheduler.sigmas[step]))
        latents = scheduler.step(direction, timestep, latents).prev_sample
        torch.testing.assert_close(clean, scheduler.model_outputs[-1])
    torch.testing.assert_close(clean, latents, msg="the last step ends at what it foresees")


@pytest.mark.parametrize("name", TEMPLATES)
@torch.inference_mode()
def test_a_step_neither_reads_nor_copies(name: str) -> None:
    scheduler = make_schedule(TEMPLATES[name][0], make_request(steps=5))
    gpu = FakeGpu()
    with gpu:
        latents = to_device(noise(3), FAKE_GPU)
        uploaded = gpu.num_uploads
        for step, timestep in enumerate(scheduler.timesteps):
            latents = scheduler.step(velocity(latents, step), timestep, latents).prev_sample
        assert gpu.num_uploads == uploaded


@pytest.mark.parametrize(
    ("name", "kind"),
    [("UniPCMultistepScheduler", FlowUniPC), ("FlowMatchEulerDiscreteScheduler", FlowMatchEulerDiscreteScheduler)],
)
def test_the_loader_reads_the_class_that_the_checkpoint_names(name: str, kind: type[Any], tmp_path: Path) -> None:
    info = replace(INFO, path=written(tmp_path, _class_name=name, shift=5.0, flow_shift=7.0))
    anything: Any = None
    loader = ComponentLoader(make_config(), info, torch.device("cpu"), torch.float32, print, anything)
    scheduler: Any = loader.scheduler()
    assert type(scheduler) is kind
    assert scheduler.config["flow_shift" if kind is FlowUniPC else "shift"] == (7.0 if kind is FlowUniPC else 5.0)


SCHEDULERS: dict[str, dict[str, Any]] = {
    "order": {"solver_order": 4},
    "solver type": {"solver_type": "bh1"},
    "kind": {"prediction_type": "epsilon"},
    "sigmas": {"use_flow_sigmas": False},
    "karras": {"use_karras_sigmas": True},
    "threshold": {"thresholding": True},
    "shift": {"flow_shift": -1.0},
    "tiny shift": {"flow_shift": 1e-20},
    "solver": {"solver_p": {"_class_name": "DDIMScheduler"}},
    "last": {"final_sigmas_type": "sigma_min"},
    "size": {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
    "class": {"_class_name": "DDIMScheduler"},
}


def written(folder: Path, **values: Any) -> Path:
    place = folder / "scheduler" / "scheduler_config.json"
    place.parent.mkdir()
    place.write_text(json.dumps({"_class_name": "UniPCMultistepScheduler", **UNIPC, **values}))
    return folder


def test_configs_of_both_schedulers(tmp_path: Path) -> None:
    for name, kind in (("UniPCMultistepScheduler", UniPCConfig), ("FlowMatchEulerDiscreteScheduler", SchedulerConfig)):
        (folder := tmp_path / name).mkdir()
        config = read_own_schedule(written(folder, _class_name=name))
        assert isinstance(config, kind)
        assert config.num_train_timesteps == 1000


@pytest.mark.parametrize("name", SCHEDULERS)
def test_variants_that_are_not_stepped_are_named(name: str, tmp_path: Path) -> None:
    values = SCHEDULERS[name]
    word = list(values)[-1].replace("_class_name", "DDIMScheduler")
    with pytest.raises(ConfigError, match=f"^scheduler/scheduler_config.json.* {word}"):
        read_own_schedule(written(tmp_path, **values))
