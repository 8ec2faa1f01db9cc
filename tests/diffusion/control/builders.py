"""Request builders for made-up models, packed or whole, of pictures and of videos."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from testbed.fakes import as_whole
from vllm_omni.diffusion.catalog.model_info import Guidance
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo, Shares
from vllm_omni.diffusion.catalog.whole_info import WholePipeline
from vllm_omni.diffusion.control.request_builder import RequestBuilder
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import WorkerReady

INFO = PackedModelInfo(
    path=Path("model"),
    family="qwen_image",
    size_multiple=16,
    pixels_per_token=16,
    max_prompt_tokens=64,
    count_prompt_tokens=lambda text: len(text.split()),
    attention_tokens=100.0,
    num_heads=4,
    head_dim=16,
    num_blocks=2,
    tensor_shares=Shares({"attention heads": 4}),
    text_encoder_shares=Shares({"attention heads": 1}),
    default_sampling_params={"height": 64, "width": 96, "num_inference_steps": 20, "true_cfg_scale": 4.0},
)


VIDEO = replace(
    INFO,
    frame_multiple=4,
    default_fps=16,
    guidance=Guidance("guidance_scale", negative_prompt="", options=("guidance_scale_2",)),
    cross_attention_tokens=20,
    default_sampling_params={
        "height": 64,
        "width": 96,
        "num_inference_steps": 4,
        "num_frames": 17,
        "guidance_scale": 5.0,
    },
)
"""A packed family that makes videos, such as Wan."""


READY = WorkerReady(
    load_seconds=0,
    load_bytes=0,
    device="cpu",
    dtype="float32",
    max_batch_tokens=256,
    seconds_per_unit=1e-3,
    step_overhead_seconds=0,
    encode_units_per_token=0.5,
    decode_units_per_token=2.0,
)


WHOLE = as_whole(
    INFO,
    WholePipeline("SomePipeline", ("height", "width", "num_inference_steps", "guidance_scale"), "callback", 1),
    guidance=Guidance("guidance_scale", needs_negative_prompt=False),
    default_sampling_params={"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 5.0},
)


def builder(**settings: object) -> RequestBuilder:
    return RequestBuilder(OmniDiffusionConfig("demo", max_pixels=512 * 512, **settings), INFO, READY)  # type: ignore[arg-type]
