"""Tiny editing models, requests to them, and diffusers' pipelines as the oracle. No pytest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import DiffusionPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from testbed.runner_driver import make_request, scheduler_of
from testbed.tiny_models import build_tiny_qwen_image
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.inputs.images import prepare_image

SIDE = 64
"""Side of the models' default pictures; diffusers fixes it at 1024."""
EDIT, PLUS = "QwenImageEditPipeline", "QwenImageEditPlusPipeline"


def build_processor(images: Qwen2VLImageProcessorPil, tokenizer: PreTrainedTokenizerBase) -> Qwen2VLProcessor:
    """Without the video part, which insists on torchvision."""
    with patch.object(Qwen2VLProcessor, "check_argument_for_proper_class"):
        return Qwen2VLProcessor(image_processor=images, tokenizer=tokenizer)


def tell_pictures(encoder: Qwen2_5_VLForConditionalGeneration, args: Any, inputs: dict[str, Any]) -> Any:
    """Say which tokens are pictures, so that they get their places in the plane.

    Up to transformers 4 the model found out by itself; diffusers' pipelines do not say so yet
    (huggingface/diffusers#14194).
    """
    return args, inputs | {"mm_token_type_ids": (inputs["input_ids"] == encoder.config.image_token_id).int()}


@contextmanager
def small_pictures() -> Iterator[None]:
    """Both of diffusers' pipelines bring pictures to an area of 1024 x 1024, whatever they are asked for: to SIDE's."""
    with ExitStack() as stack:
        for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
            fit = module.calculate_dimensions
            small = lambda area, ratio, fit=fit: fit(SIDE * SIDE if area == 1024 * 1024 else area, ratio)  # noqa: E731
            stack.enter_context(patch.object(module, "calculate_dimensions", small))
        yield


def build(path: Path, pipeline: str, **settings: Any) -> Path:
    defaults: dict[str, object] = {"height": SIDE, "width": SIDE, "num_inference_steps": 4}
    return build_tiny_qwen_image(path, edit=pipeline, default_sampling_params=defaults, **settings)


def reference(path: Path, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(path, dtype=dtype, processor=None)
    images = Qwen2VLImageProcessorPil.from_pretrained(path / "processor")
    pipeline.processor = build_processor(images, pipeline.tokenizer)
    pipeline.text_encoder.register_forward_pre_hook(tell_pictures, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def request_of(path: Path, request_id: str, pictures: list[Image.Image], **fields: Any) -> DiffusionRequest:
    """Request as the server resolves it: without a size, it has that of the last picture."""
    edit = load_model_info(str(path)).image_input
    assert edit is not None
    images = tuple(prepare_image(picture, edit.sizes) for picture in pictures)
    height, width = images[-1].reference.shape[:2]
    return make_request(request_id, **{"height": height, "width": width, "images": images, **fields})


def draw(
    pipeline: DiffusionPipeline, pictures: list[Image.Image], request: DiffusionRequest, **more: Any
) -> np.ndarray:
    """float32 [height, width, 3] in [0, 1]; without a size among `more` diffusers chooses it."""
    with scheduler_of(pipeline, request):
        images = pipeline(
            image=pictures if isinstance(pipeline, QwenImageEditPlusPipeline) else pictures[0],
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.num_inference_steps,
            true_cfg_scale=request.true_cfg_scale,
            sigmas=None if request.sigmas is None else list(request.sigmas),
            generator=torch.Generator().manual_seed(request.seed),
            output_type="np",
            **more,
        ).images
    picture: np.ndarray = images[0]
    return picture
