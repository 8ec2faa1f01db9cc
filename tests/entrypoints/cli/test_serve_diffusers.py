"""The command on a model that diffusers' own pipeline serves, as a process, with the SDK."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import openai
import pytest

from testbed.tiny_diffusers import build_tiny_diffusers, save_tiny_adapter
from tests.entrypoints.cli.server_process import server_process, stop

pytestmark = pytest.mark.thorough


def test_the_log_and_the_model_say_which_path_serves(tmp_path: Path) -> None:
    model = build_tiny_diffusers("StableDiffusion3Pipeline", tmp_path / "tiny")
    adapter = save_tiny_adapter(model, tmp_path / "ink", 0)
    recipe = {"name": "ink", "path": str(adapter), "defaults": {"num_inference_steps": 2}, "base_model_name": "tiny"}
    flags = ("--host", "127.0.0.1", "--port", "0", "--served-model-name", "tiny", "--lora-modules", json.dumps(recipe))
    loading = ("--lora-dir", str(tmp_path), "--enable-lora-loading", "--max-loras", "2", "--max-cpu-loras", "3")
    with server_process(*flags, *loading, model=str(model)) as process:
        process.wait_for_line(r"Ready: tiny \(diffusers, ")
        with openai.OpenAI(base_url=f"{process.address()}/v1", api_key="none", max_retries=0) as sdk:
            assert sdk.models.retrieve("tiny").model_dump()["served_by"] == "diffusers"
            assert sdk.models.retrieve("ink").model_dump()["parent"] == "tiny"
            made = sdk.images.generate(model="ink", prompt="a red apple").model_dump()
            assert made["timings"]["computed_steps"] == 2
            for route, done in (("load", "added"), ("unload", "removed")):
                body = {"lora_name": "new", "lora_path": "ink"}
                answer = httpx.post(f"{process.address()}/v1/{route}_lora_adapter", json=body)
                assert (answer.status_code, answer.text) == (200, f"Success: LoRA adapter 'new' {done} successfully.")
        assert stop(process) == 0
