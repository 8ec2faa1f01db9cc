"""Example bodies of the OpenAPI schema: the served model accepts them unchanged."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from vllm_omni.diffusion.catalog.model_info import ModelInfo

_PROMPT = "a red apple"
_EDIT_PROMPT = "make it green"
_INPUT_SIDE = 64


def generation_example(model_name: str) -> dict[str, Any]:
    return {"model": model_name, "prompt": _PROMPT, "size": "auto", "n": 1, "seed": 7}


def edit_example(model_name: str) -> dict[str, Any]:
    """Example of a JSON body."""
    return edit_form_example(model_name) | {"image": _input_picture()}


def edit_form_example(model_name: str) -> dict[str, Any]:
    """Example of the fields of a form, without the file `image`, which the client chooses."""
    return {"model": model_name, "prompt": _EDIT_PROMPT, "size": "auto", "n": 1, "seed": 7}


def chat_example(model_name: str, info: ModelInfo) -> dict[str, Any]:
    content: str | list[dict[str, Any]] = _PROMPT
    if info.image_input is not None and info.image_input.min_images:
        picture = {"type": "image_url", "image_url": {"url": _input_picture()}}
        content = [{"type": "text", "text": _EDIT_PROMPT}, picture]
    return {"model": model_name, "messages": [{"role": "user", "content": content}], "seed": 7}


def _input_picture() -> str:
    """A small red picture as a `data:` URL."""
    file = io.BytesIO()
    Image.new("RGB", (_INPUT_SIDE, _INPUT_SIDE), "firebrick").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
