"""Example bodies of the OpenAPI schema: the served model accepts them unchanged."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from vllm_omni.diffusion.catalog.model_info import ModelInfo

_PROMPT = "a red apple"
EDIT_PROMPT = "make it green"
_INPUT_SIDE = 64


def form_example(model_name: str, prompt: str = _PROMPT) -> dict[str, Any]:
    """Example of a body without input pictures; in a form of an edit the client chooses the file `image`."""
    return {"model": model_name, "prompt": prompt, "size": "auto", "n": 1, "seed": 7}


def edit_example(model_name: str) -> dict[str, Any]:
    return form_example(model_name, EDIT_PROMPT) | {"image": _input_picture()}


def video_form_example(model_name: str) -> dict[str, Any]:
    """Example of a request for a video without a picture; in a form the client chooses the file `input_reference`."""
    return {"model": model_name, "prompt": _PROMPT, "seed": 7}


def video_example(model_name: str, needs_image: bool) -> dict[str, Any]:
    picture = {"input_reference": {"image_url": _input_picture()}} if needs_image else {}
    return video_form_example(model_name) | picture


def chat_example(model_name: str, info: ModelInfo) -> dict[str, Any]:
    content: str | list[dict[str, Any]] = _PROMPT
    if info.needs_image:
        picture = {"type": "image_url", "image_url": {"url": _input_picture()}}
        content = [{"type": "text", "text": EDIT_PROMPT}, picture]
    return {"model": model_name, "messages": [{"role": "user", "content": content}], "seed": 7}


def _input_picture() -> str:
    """A small red picture as a `data:` URL."""
    file = io.BytesIO()
    Image.new("RGB", (_INPUT_SIDE, _INPUT_SIDE), "firebrick").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
