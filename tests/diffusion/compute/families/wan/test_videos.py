"""Whole videos against diffusers' WanPipeline and WanImageToVideoPipeline, made in one mixed batch."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanImageToVideoPipeline, WanPipeline

from testbed.runner_driver import QUICK, Drive, fitted, kept, make_request, psnr, scheduler_of
from testbed.tiny_models import photo
from testbed.tiny_wan import KINDS, build_tiny_wan
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup
from vllm_omni.diffusion.compute.families.wan.image import WanImageEncoder
from vllm_omni.diffusion.compute.families.wan.pipeline import to_tokens
from vllm_omni.diffusion.compute.families.wan.vae import ConditioningVideo, WanDecoder, WanEncoder
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.inputs.images import prepare_image

pytestmark = pytest.mark.usefixtures("one_thread")

PHOTOS = [photo(80, 60, 1), photo(50, 70, 2)]
SMALL: dict[str, object] = {"height": 32, "width": 32, "num_frames": 5}


def started(path: Path, **settings: Any) -> ModelRunner:
    runner = ModelRunner(OmniDiffusionConfig(model=str(path), **settings), load_model_info(str(path)), options=QUICK)
    runner.start()
    return runner


def request(request_id: str, prompt: str, **changes: Any) -> DiffusionRequest:
    fields = {"num_frames": 9, "height": 32, "width": 64}
    return make_request(request_id, prompt, **(fields | changes))


def arrivals_of(path: Path, kind: str) -> dict[int, list[DiffusionRequest]]:
    """Videos and pictures of several lengths, sizes, steps and kinds of guidance, which join and leave."""
    # Where the transformer sees pictures, diffusers takes all tokens but the last 512 for theirs.
    padded: dict[str, Any] = {} if KINDS[kind].sees_image else {"max_sequence_length": 24}
    images = pictures_of(path, kind)
    common = padded if kind == "ti2v-5b" else padded | images
    second = {"guidance_scale_2": 2.5} if KINDS[kind].has_two_experts else {}
    return {
        0: [
            request("guided", "a red apple", negative_prompt="a blue car", seed=3, num_inference_steps=5, **common),
            request("long", "a car &amp; a  photo", num_frames=13, width=32, num_inference_steps=6, seed=1, **common),
        ],
        2: [
            request("scales", "blue", negative_prompt="", seed=2**40, num_inference_steps=4, **second, **common),
            request("wide", "apple " * 40, height=64, num_frames=5, flow_shift=5.0, num_inference_steps=3, **common),
            request("one step", "red", height=64, num_frames=5, num_inference_steps=1, **common),
        ]
        + [request("picture", "a photo", num_frames=1, height=64, seed=7, **common)] * (KINDS[kind].sees_image < 2)
        + [request("animated", "apple", num_inference_steps=3, seed=5, **padded, **images)] * (kind == "ti2v-5b")
        + [request("last", "red", num_inference_steps=2, **padded, **pictures_of(path, kind, 2))]
        * (kind == "i2v-a14b"),
    }


def pictures_of(path: Path, kind: str, count: int | None = None) -> dict[str, Any]:
    """Input pictures: `count` of them, or as few as the kind takes."""
    image_input = load_model_info(str(path)).image_input
    if image_input is None:
        return {}
    photos = PHOTOS[: count or max(1, KINDS[kind].sees_image)]
    return {"images": tuple(prepare_image(picture, image_input.sizes) for picture in photos)}


def reference(path: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, request: DiffusionRequest) -> np.ndarray:
    """float32 [frames, height, width, 3] in [0, 1]."""
    images = PHOTOS[: len(request.images)]
    more: dict[str, Any] = dict(zip(("image", "last_image"), images))
    if request.guidance_scale_2 is not None:
        more["guidance_scale_2"] = request.guidance_scale_2
    call = pipeline
    if images and isinstance(pipeline, WanPipeline):  # the model of 5B parameters does both
        call = WanImageToVideoPipeline(**pipeline.components, expand_timesteps=True)
        call.set_progress_bar_config(disable=True)
    with scheduler_of(call, request):
        frames: np.ndarray = call(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.true_cfg_scale,
            max_sequence_length=request.max_sequence_length,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="np",
            **more,
        ).frames[0]
    return frames


def check(images: Mapping[str, np.ndarray], requests: Sequence[DiffusionRequest], path: Path) -> None:
    pipeline = reference(path)
    assert set(images) == {request.request_id for request in requests}
    for request in requests:
        frames, wanted = images[request.request_id], draw(pipeline, request)
        assert frames.dtype == np.uint8
        assert frames.shape == (wanted.shape if request.num_frames > 1 else wanted.shape[1:])
        assert wanted.std() > 0.02, "a flat video proves nothing"
        score = psnr(frames.reshape(wanted.shape), (wanted * 255).round().astype(np.uint8))
        assert score >= 60, f"{request.request_id}: {score:.1f} dB"


OTHER_RUNS = {"i2v-a14b": pytest.mark.thorough, "t2v-2.1": pytest.mark.layouts, "i2v-2.1": pytest.mark.layouts}
"""Kinds whose parts are each in another kind, too."""


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=OTHER_RUNS.get(kind, ())) for kind in KINDS])
def test_a_mixed_batch_draws_what_diffusers_draws(tmp_path: Path, kind: str) -> None:
    path = build_tiny_wan(tmp_path / "model", kind, default_sampling_params=SMALL)
    info = load_model_info(str(path))
    arrivals = {
        step: [fitted(request, info) for request in joining] for step, joining in arrivals_of(path, kind).items()
    }
    runner = started(path)
    drive = Drive(runner).run(arrivals)
    assert not drive.errors
    check(drive.images, [request for joining in arrivals.values() for request in joining], path)
    assert kept(runner) == 0


@pytest.mark.parametrize("kind", ["i2v-a14b", "flf2v-2.1", "ti2v-5b"])
@torch.inference_mode()
def test_pictures_are_encoded_once_for_all_outputs(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build_tiny_wan(tmp_path / "model", kind, default_sampling_params=SMALL)
    pipeline: Any = started(path).pipeline
    info = load_model_info(str(path))
    calls = Counter[str]()
    for cls, method in ((ConditioningVideo, "finish"), (WanImageEncoder, "__call__")):
        monkeypatch.setattr(cls, method, counted(cls, method, calls))
    images = pictures_of(path, kind)
    padded = {} if KINDS[kind].sees_image else {"max_sequence_length": 24}
    first = fitted(request("first", "red", seed=1, negative_prompt="", **padded, **images), info)
    again = pipeline.encode(replace(first, seed=2))
    assert torch.equal(again.given, pipeline.encode(first).given)
    seen = int(bool(KINDS[kind].sees_image))
    assert (calls["ConditioningVideo"], calls["WanImageEncoder"]) == (1, seen)
    longer = pipeline.encode(replace(first, num_frames=13))
    pipeline.encode(fitted(replace(first, width=32, **images), info))
    # The 5B model encodes a first frame alone, whatever the length of the video.
    assert calls["ConditioningVideo"] == (2 if kind == "ti2v-5b" else 3)
    assert calls["WanImageEncoder"] <= 2 * seen
    assert len(longer.given) == len(again.given) * (1 if kind == "ti2v-5b" else 4 / 3)


@pytest.mark.parametrize("kind", ["i2v-2.1", "ti2v-5b"])
@torch.inference_mode()
def test_pictures_are_encoded_and_decoded_in_float32(tmp_path: Path, kind: str) -> None:
    """As in the published examples, beside a transformer in bfloat16."""
    path = build_tiny_wan(tmp_path / "model", kind, default_sampling_params=SMALL)
    pipeline: Any = started(path, dtype="bfloat16").pipeline
    assert pipeline.transformer.patch_embedding.weight.dtype == torch.bfloat16
    vae = AutoencoderKLWan.from_pretrained(path / "vae", dtype=torch.float32)
    one = fitted(request("one", "red", width=32, **pictures_of(path, kind, 1)), load_model_info(str(path)))
    whole = 1 if kind == "ti2v-5b" else one.num_frames
    expected = to_tokens(ConditioningVideo(WanEncoder(vae), whole, one.images[0].reference).finish())
    state = pipeline.encode(one)
    assert torch.equal(state.given[:, -expected.shape[1] :], expected)
    (picture,) = pipeline.decode([one], [state.latents])
    (wanted,) = WanDecoder(vae, False, DecodeGroup.alone())([state.latents], [state.grid])
    assert torch.equal(picture.pixels, wanted.pixels)


def counted(cls: type[Any], method: str, calls: Counter[str]) -> Callable[..., Any]:
    """Method of `cls` that counts its calls."""
    original = getattr(cls, method)

    def call(self: Any, *arguments: Any) -> Any:
        calls[cls.__name__] += 1
        return original(self, *arguments)

    return call


@torch.inference_mode()
def test_requests_with_the_same_text_share_its_keys_while_they_run(tmp_path: Path) -> None:
    pipeline: Any = started(build_tiny_wan(tmp_path / "model", "t2v-a14b", default_sampling_params=SMALL)).pipeline
    first, second = (
        pipeline.encode(request(name, name, negative_prompt="", max_sequence_length=24)) for name in ("red", "blue")
    )
    for keys, others in zip(first.static_keys, second.static_keys, strict=True):
        assert keys[0]["text"] is not others[0]["text"]
        assert keys[1]["text"] is others[1]["text"], "the empty negative prompt"
    assert first.static_keys[0][1]["text"] is not first.static_keys[1][1]["text"], "another transformer"
    kept_keys = weakref.ref(first.static_keys[0][1]["text"])
    del first, keys, others
    gc.collect()
    assert kept_keys() is not None
    del second
    gc.collect()
    assert kept_keys() is None
