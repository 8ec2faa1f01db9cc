"""Requests that resume from a checkpoint give the pixels of the undisturbed run: each family, scheduler and layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from testbed.runner_driver import fitted, kept, make_request, psnr
from testbed.tiny_adapters import random_pairs, save_peft, transformer_of
from testbed.tiny_models import SMALL, build_tiny_qwen_image, photo
from testbed.tiny_wan import BOUNDARY, build_tiny_wan
from testbed.tiny_z_image import build_tiny_z_image
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.worker.replica import started
from tests.diffusion.compute.worker.scheduled_replica import Replica
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.step.pipeline import PackedPipeline
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.checkpoint import LATENTS, Checkpoint, check_checkpoint
from vllm_omni.diffusion.messages.request import DiffusionRequest, LoRA
from vllm_omni.diffusion.messages.worker import RankInfo
from vllm_omni.inputs.images import prepare_image

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE, ONE_RANK = RankInfo(), DiffusionParallelConfig()
NUM_STEPS = 5
EACH_STEP = 1e-9
"""`checkpoint_seconds` of a request that gives a checkpoint after each step."""


@dataclass(frozen=True)
class Model:
    build: Callable[..., Path]
    num_frames: int = 5
    has_picture: bool = False
    dtype: str = "float32"
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of its requests."""

    def start(self, path: Path) -> ModelRunner:
        return started(ALONE, ONE_RANK, path, dtype=self.dtype)

    def request(self, path: Path, **changes: Any) -> DiffusionRequest:
        """A guided request of `NUM_STEPS` steps."""
        info = load_model_info(str(path))
        images: tuple[Any, ...] = ()
        if self.has_picture:
            assert info.image_input is not None
            images = (prepare_image(photo(40, 40, 1), info.image_input.sizes),)
        fields: dict[str, Any] = {
            "request_id": "whole",
            "height": 32,
            "width": 32,
            "num_inference_steps": NUM_STEPS,
            "num_frames": self.num_frames,
        }
        fields |= {"negative_prompt": "a blue car", "seed": 3, "images": images, **self.extra}
        return fitted(make_request(**fields | changes), info)


wan = partial(build_tiny_wan, default_sampling_params=SMALL)
PADDED = {"max_sequence_length": 24}
MODELS = {
    "wan": Model(partial(wan, kind="t2v-2.1"), extra=PADDED),
    "two experts": Model(partial(wan, kind="t2v-a14b"), extra=PADDED | {"guidance_scale_2": 2.5}),
    "wan by Euler": Model(partial(wan, kind="t2v-2.1", is_euler=True), extra=PADDED),
    "5b": Model(partial(wan, kind="ti2v-5b"), extra=PADDED),
    "5b from a picture": Model(partial(wan, kind="i2v-5b"), has_picture=True, extra=PADDED),
    "from a picture": Model(partial(wan, kind="i2v-2.1"), has_picture=True),
    "two experts from a picture": Model(partial(wan, kind="i2v-a14b"), has_picture=True, extra=PADDED),
    "qwen_image": Model(partial(build_tiny_qwen_image, default_sampling_params=SMALL), 1, extra={"flow_shift": 3.0}),
    "z_image": Model(partial(build_tiny_z_image, default_sampling_params=SMALL), 1, extra={"cfg_truncation": 0.5}),
    "z_image in bfloat16": Model(
        partial(build_tiny_z_image, default_sampling_params=SMALL), 1, dtype="bfloat16", extra={"flow_shift": 1.5}
    ),
    "wan in bfloat16": Model(partial(wan, kind="t2v-2.1"), dtype="bfloat16", extra=PADDED),
}
QUICK_MODELS = ("two experts", "z_image in bfloat16")
CASES = [pytest.param(name, marks=() if name in QUICK_MODELS else pytest.mark.thorough) for name in MODELS]


def run(runner: ModelRunner, requests: Sequence[DiffusionRequest], **values: Any) -> dict[str, np.ndarray]:
    replica = Replica(runner, ONE_RANK)
    replica.add(requests, **values)
    made = replica.run()
    assert not replica.errors
    return made


def run_whole(
    runner: ModelRunner, request: DiffusionRequest, parallel: DiffusionParallelConfig = ONE_RANK
) -> tuple[np.ndarray, list[Checkpoint]]:
    """Pixels of an undisturbed run, and the checkpoints after each of its steps."""
    replica = Replica(runner, parallel)
    replica.add([request], checkpoint_seconds=EACH_STEP)
    (pixels,) = replica.run().values()
    checkpoints = replica.checkpoints[request.request_id]
    assert [checkpoint.step for checkpoint in checkpoints] == [*range(1, NUM_STEPS + 1)]
    for checkpoint in checkpoints:
        check_checkpoint(checkpoint, NUM_STEPS)
    assert pixels.std() > 2, "a flat picture proves nothing"
    return pixels, checkpoints


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_request_gives_the_pixels_of_the_undisturbed_run(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    path = model.build(tmp_path / "model")
    runner, request = model.start(path), model.request(path)
    whole, checkpoints = run_whole(runner, request)
    if "experts" in name:
        check_experts(runner, request, checkpoints)
    for checkpoint in checkpoints:
        (alone,) = run(runner, [request], resume=checkpoint).values()
        assert np.array_equal(alone, whole)

    replica = Replica(runner, ONE_RANK)
    for checkpoint in checkpoints:
        replica.add([replace(request, request_id=f"at {checkpoint.step}")], resume=checkpoint)
    replica.add([model.request(path, request_id="other", prompt="a photo", seed=8)])
    together = replica.run()
    (other,) = run(runner, [model.request(path, prompt="a photo", seed=8)]).values()
    least = 60 if model.dtype == "float32" else 30
    assert psnr(together.pop("other"), other) >= least
    assert len(together) == NUM_STEPS
    assert all(psnr(pixels, whole) >= least for pixels in together.values())
    assert kept(runner) == 0


@torch.inference_mode()
def check_experts(runner: ModelRunner, request: DiffusionRequest, checkpoints: Sequence[Checkpoint]) -> None:
    """Check that step caches count the steps of the second expert from its first one, also after a resume."""
    timesteps = [float(str(checkpoint.values["timestep"])) for checkpoint in checkpoints[:-1]]
    change = next(c.step for c, timestep in zip(checkpoints, timesteps) if timestep < 1000 * BOUNDARY)
    assert 1 < change < NUM_STEPS, "checkpoints before and after the change of the expert"
    pipeline = runner.pipeline
    assert isinstance(pipeline, PackedPipeline)
    for checkpoint in checkpoints:
        state = pipeline.encode(request)
        pipeline.resume(state, checkpoint)
        assert (state.step, state.first_step) == (checkpoint.step, change if checkpoint.step >= change else 0)


def resume_on(
    place: RankInfo,
    parallel: DiffusionParallelConfig,
    path: Path,
    request: DiffusionRequest,
    checkpoints: Sequence[Checkpoint],
) -> tuple[list[np.ndarray], np.ndarray, list[Checkpoint]]:
    """Pixels of requests that resume on this layout, and the pixels and checkpoints of its own undisturbed run."""
    runner = started(place, parallel, path)
    replica = Replica(runner, parallel)
    for checkpoint in checkpoints:
        replica.add([replace(request, request_id=f"at {checkpoint.step}")], resume=checkpoint)
    made = replica.run()
    assert not replica.errors
    pixels, own = run_whole(runner, request, parallel)
    assert kept(runner) == 0
    return [made[f"at {checkpoint.step}"] for checkpoint in checkpoints], pixels, own


LAYOUTS = [
    pytest.param("two experts", {"ulysses_degree": 2, "tensor_parallel_size": 2}, marks=pytest.mark.thorough),
    pytest.param("two experts", {"ring_degree": 2, "cfg_parallel_size": 2}, marks=pytest.mark.layouts),
    pytest.param("two experts", {"tensor_parallel_size": 2, "text_encoder_tp_size": 2}, marks=pytest.mark.layouts),
    pytest.param("qwen_image", {"ulysses_degree": 2}, marks=pytest.mark.layouts),
    pytest.param("z_image", {"ring_degree": 2}, marks=pytest.mark.layouts),
    pytest.param("wan", {"cfg_parallel_size": 2}),
]


@pytest.mark.parametrize(("name", "degrees"), LAYOUTS)
def test_a_request_resumes_on_another_layout(name: str, degrees: dict[str, int], tmp_path: Path) -> None:
    model, parallel = MODELS[name], DiffusionParallelConfig(**degrees)
    path = model.build(tmp_path / "model", heads=4)
    runner, request = model.start(path), model.request(path)
    whole, checkpoints = run_whole(runner, request)
    chosen = [checkpoints[0], checkpoints[2], checkpoints[-1]]
    for resumed, undisturbed, own in run_places(resume_on, parallel, parallel, path, request, chosen):
        for pixels in (*resumed, undisturbed):
            assert psnr(pixels, whole) >= 60
        (back,) = run(runner, [request], resume=own[2]).values()
        assert psnr(back, whole) >= 60


# Refused ----------------------------------------------------------------------------------------------------


def changed(checkpoint: Checkpoint, name: str, array: np.ndarray, dtype: str = "float32") -> Checkpoint:
    arrays, dtypes = checkpoint.arrays | {name: array}, checkpoint.dtypes | {name: dtype}
    return replace(checkpoint, arrays=arrays, dtypes=dtypes)


def without(checkpoint: Checkpoint, name: str) -> Checkpoint:
    arrays, dtypes = dict(checkpoint.arrays), dict(checkpoint.dtypes)
    del arrays[name], dtypes[name]
    return replace(checkpoint, arrays=arrays, dtypes=dtypes)


def test_a_checkpoint_that_does_not_fit_is_an_error_of_its_request_alone(tmp_path: Path) -> None:
    model = MODELS["wan"]
    path = model.build(tmp_path / "model")
    runner, request = model.start(path), model.request(path)
    whole, (_, second, *_, last) = run_whole(runner, request)
    latents = second.arrays[LATENTS]
    bad = {
        "latents of shape": changed(second, LATENTS, latents[1:]),
        "scheduler.last_sample of shape": changed(second, "scheduler.last_sample", latents[:, :4]),
        "latents of dtype float16": changed(second, LATENTS, latents.astype(np.float16), "float16"),
        "latents of dtype bfloat16": changed(second, LATENTS, latents.astype(np.int16), "bfloat16"),
        "seed 4, the request has 3": replace(second, values=second.values | {"seed": 4}),
        "num_inference_steps 9": replace(second, values=second.values | {"num_inference_steps": 9}),
        "scheduler 'Other'": replace(second, values=second.values | {"scheduler": "Other"}),
        "timestep": replace(second, step=3),
        "true_cfg_scale 1.0": replace(second, values=second.values | {"true_cfg_scale": 1.0}),
        "images ['ab']": replace(second, values=second.values | {"images": ["ab"]}),
        "more 1": replace(second, values=second.values | {"more": 1}),
        "the arrays latents, scheduler.model": without(second, "scheduler.last_sample"),
        "the arrays latents, scheduler.config": changed(second, "scheduler.config", latents),
        "the arrays latents, scheduler.last": changed(last, "scheduler.last_sample", latents),
    }
    replica = Replica(runner, ONE_RANK)
    replica.add([request])
    for fault, checkpoint in bad.items():
        replica.add([replace(request, request_id=fault)], resume=checkpoint)
    made = replica.run()
    assert made.keys() == {"whole"}
    assert psnr(made["whole"], whole) >= 60
    assert replica.errors.keys() == bad.keys()
    for fault, error in replica.errors.items():
        assert (error.kind, error.param) == ("invalid", "resume")
        assert fault in error.message
    assert kept(runner) == 0


@pytest.mark.thorough
def test_a_checkpoint_resumes_with_its_own_prompts_and_adapters_alone(tmp_path: Path) -> None:
    model = MODELS["z_image"]
    path = model.build(tmp_path / "model")
    transformer = transformer_of(path)
    files = [save_peft(random_pairs(transformer, seed), tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(files[0].read_bytes())
    first, second = (LoRA("a", str(file), 0.5) for file in files)
    runner, request = model.start(path), model.request(path, loras=(first,))
    whole, checkpoints = run_whole(runner, request)
    bad: dict[str, dict[str, Any]] = {
        "another": {"loras": (second,)},
        "scale": {"loras": (replace(first, scale=0.25),)},
        "none": {"loras": ()},
        "one more": {"loras": (first, second)},
        "prompt": {"prompt": "a photo"},
        "negative": {"negative_prompt": "a photo"},
    }
    replica = Replica(runner, ONE_RANK)
    replica.add([replace(request, loras=(LoRA("b", str(copy), 0.5),))], resume=checkpoints[1])
    for fault, fields in bad.items():
        replica.add([model.request(path, **({"request_id": fault, "loras": (first,)} | fields))], resume=checkpoints[1])
    made = replica.run()
    assert made.keys() == {"whole"}, "a copy of the file is the same adapter"
    assert psnr(made["whole"], whole) >= 60
    assert replica.errors.keys() == bad.keys()
    for fault, error in replica.errors.items():
        assert (error.kind, error.param) == ("invalid", "resume")
        assert ("prompts" if fault in ("prompt", "negative") else "adapters") in error.message


def test_latents_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = MODELS["wan"]
    path = model.build(tmp_path / "model")
    runner = model.start(path)
    replica = Replica(runner, ONE_RANK)
    advance = runner.pipeline.advance

    def spoiled(state: Any, *arguments: Any) -> Any:
        clean = advance(state, *arguments)
        if state.request.request_id == "whole" and state.step == 2:
            state.latents = state.latents * torch.nan
        return clean

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.pipeline, "advance", spoiled)
        replica.add([model.request(path), model.request(path, request_id="other")], checkpoint_seconds=EACH_STEP)
        made = replica.run()
    assert made.keys() == {"other"}
    assert [(i, error.kind) for i, error in replica.errors.items()] == [("whole", "not_finite")]
    assert [checkpoint.step for checkpoint in replica.checkpoints["whole"]] == [1]
    assert [checkpoint.step for checkpoint in replica.checkpoints["other"]] == [*range(1, NUM_STEPS + 1)]
    assert kept(runner) == 0
