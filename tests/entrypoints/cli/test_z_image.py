"""Z-Image through the command, with two ranks that share the guidance branches, against diffusers."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from PIL import Image

from testbed.runner_driver import psnr
from testbed.tiny_z_image import BASE_SHIFT, build_tiny_z_image
from tests.entrypoints.cli.server_process import server_process

pytestmark = pytest.mark.thorough


def test_the_server_draws_what_diffusers_draws(tmp_path: Path) -> None:
    path = build_tiny_z_image(tmp_path / "model", shift=BASE_SHIFT, default_sampling_params={"height": 64, "width": 64})
    settings = {"guidance_scale": 4.0, "cfg_normalization": True, "cfg_truncation": 0.5, "num_inference_steps": 5}
    flags = ("--host", "127.0.0.1", "--port", "0", "--served-model-name", "z-image", "--cfg-parallel-size", "2")
    with server_process(*flags, model=str(path)) as process:
        process.wait_until_ready()
        with httpx.Client(base_url=process.address()) as client:
            body = {"model": "z-image", "prompt": "a red apple", "size": "48x80", "seed": 7}
            answer = client.post("/v1/images/generations", json=body | settings)
            refused = client.post("/v1/images/generations", json=body | {"true_cfg_scale": 4.0})
    assert answer.status_code == 200, answer.text
    assert "x-omni-ignored-fields" not in answer.headers
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "true_cfg_scale")
    assert "guidance_scale" in refused.json()["error"]["message"]

    pipeline = ZImagePipeline.from_pretrained(path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    images = pipeline("a red apple", height=80, width=48, generator=generator, output_type="np", **settings).images
    assert psnr(picture, (images[0] * 255).round().astype(np.uint8)) >= 60
