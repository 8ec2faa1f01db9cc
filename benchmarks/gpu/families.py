"""Small models of each family, and diffusers' pictures for the same requests: for section `parity`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from testbed import tiny_edit_models as editing
from testbed.runner_driver import make_request
from testbed.tiny_models import build_tiny_qwen_image, photo
from testbed.tiny_z_image import build_tiny_z_image
from vllm_omni.diffusion.catalog.find_folder import DEMO_MODEL_PATH
from vllm_omni.diffusion.compute.step.sampling import draw_noise, pack_latents
from vllm_omni.diffusion.messages.request import DiffusionRequest

STEPS = 6
SIZES = ((64, 64), (96, 64), (80, 112))
PHOTOS = ((64, 64), (90, 60), (31, 70))
"""Width and height in pixels of the pictures to edit, which determine the sizes of the outputs."""
TEXTS: dict[str, Any] = {"prompt": "a red apple", "negative_prompt": "a blue car"}
SCALE = 4.0
Fields = dict[str, Any]


@dataclass(frozen=True)
class Family:
    build: Callable[[Path], object] | None
    """Function that writes the model; None: the embedded demo model."""
    fields: Fields
    """Fields of the requests."""
    arguments: Fields
    """Arguments for the same requests in diffusers."""
    edits: int = 0
    """Number of pictures to edit per request."""
    packs_latents: bool = False
    """Whether diffusers takes noise in the packed form of Qwen-Image's transformer."""

    def model(self, path: Path) -> Path:
        """Folder of the model, written to `path` unless it exists."""
        if self.build is None:
            return DEMO_MODEL_PATH
        if not (path / "model_index.json").is_file():
            self.build(path)
        return path

    def requests(self, path: Path) -> list[DiffusionRequest]:
        """Requests of several sizes, to run at once."""
        common = {"num_inference_steps": STEPS, **self.fields}
        if self.edits:
            return [
                editing.request_of(path, str(i), self.photos(i), **{**common, "seed": i}) for i in range(len(PHOTOS))
            ]
        return [
            make_request(str(i), height=h, width=w, seed=i, **{"true_cfg_scale": 1.0, **common})
            for i, (h, w) in enumerate(SIZES)
        ]

    def photos(self, index: int) -> list[Image.Image]:
        return [photo(*PHOTOS[(index + k) % len(PHOTOS)], index + k) for k in range(self.edits)]

    def load(self, path: Path, dtype: torch.dtype, device: torch.device) -> Any:
        """Load diffusers' pipeline."""
        if self.edits:
            return editing.reference(path, dtype).to(device)
        pipeline = DiffusionPipeline.from_pretrained(path, dtype=dtype).to(device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def draw(self, pipeline: Any, request: DiffusionRequest, noise: torch.dtype | None = None) -> np.ndarray:
        """Picture by diffusers, uint8 [height, width, 3]. `noise`: dtype of the noise; None: the pipeline draws it."""
        more: Fields = {"height": request.height, "width": request.width}
        if noise is not None and self.packs_latents:
            shape = (16, request.height // 8, request.width // 8)
            latents = pack_latents(draw_noise(shape, request.seed, noise, torch.device("cpu")))[None]
            more["latents"] = latents.to(pipeline.device, pipeline.transformer.dtype)
        if self.edits:
            with editing.small_pictures():
                picture = editing.draw(pipeline, self.photos(int(request.request_id)), request, **more)
        else:
            picture = pipeline(
                **self.arguments,
                **more,
                num_inference_steps=request.num_inference_steps,
                generator=torch.Generator("cpu").manual_seed(request.seed),
                output_type="np",
            ).images[0]
        return (picture * 255).round().astype(np.uint8)


def _build_whole(path: Path, class_name: str) -> None:
    from testbed.tiny_diffusers import build_tiny_diffusers  # late: only this needs peft

    build_tiny_diffusers(class_name, path)


_QWEN_IMAGE = {**TEXTS, "true_cfg_scale": SCALE}
# A whole pipeline takes its scale as `guidance_scale`.
_WHOLE = {"prompt": TEXTS["prompt"], "guidance_scale": SCALE, "max_sequence_length": 64}
FAMILIES: dict[str, Family] = {
    "demo": Family(None, _QWEN_IMAGE, _QWEN_IMAGE, packs_latents=True),
    "qwen-image": Family(partial(build_tiny_qwen_image, heads=4), _QWEN_IMAGE, _QWEN_IMAGE, packs_latents=True),
    "qwen-image-edit": Family(
        partial(editing.build, pipeline=editing.EDIT, heads=4), _QWEN_IMAGE, {}, edits=1, packs_latents=True
    ),
    "qwen-image-edit-plus": Family(
        partial(editing.build, pipeline=editing.PLUS, heads=4), _QWEN_IMAGE, {}, edits=2, packs_latents=True
    ),
    "z-image": Family(
        partial(build_tiny_z_image, heads=4),
        {**TEXTS, "true_cfg_scale": 1 + SCALE},
        {**TEXTS, "guidance_scale": SCALE},
    ),
    "sd3": Family(partial(_build_whole, class_name="StableDiffusion3Pipeline"), _WHOLE, _WHOLE),
    "flux": Family(partial(_build_whole, class_name="FluxPipeline"), _WHOLE, _WHOLE),
}
"""Families: first the demo model, which is trained; the last two are whole pipelines of diffusers."""
