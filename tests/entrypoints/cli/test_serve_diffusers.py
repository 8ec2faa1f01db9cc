"""The command on a model that diffusers' own pipeline serves in the server's own process, with the SDK."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from testbed.tiny_diffusers import build_tiny_diffusers, save_tiny_adapter
from tests.entrypoints.cli.server_process import server_process, stop

pytestmark = pytest.mark.thorough


def test_the_log_and_the_model_say_which_path_serves(tmp_path: Path) -> None:
    model = build_tiny_diffusers("StableDiffusion3Pipeline", tmp_path / "tiny")
    adapter = save_tiny_adapter(model, tmp_path / "ink", 0)
    flags = (
        *("--host", "127.0.0.1", "--port", "0", "--served-model-name", "tiny", "--lora-modules", f"ink={adapter}"),
        *("--distributed-executor-backend", "uni"),
    )
    with server_process(*flags, model=str(model)) as process:
        process.wait_for_line(r"Ready: tiny \(diffusers, ")
        assert process.workers() == []
        with openai.OpenAI(base_url=f"{process.address()}/v1", api_key="none", max_retries=0) as sdk:
            assert sdk.models.retrieve("tiny").model_dump()["served_by"] == "diffusers"
            assert sdk.models.retrieve("ink").model_dump()["parent"] == "tiny"
            steps = {"num_inference_steps": 2}
            assert sdk.images.generate(model="ink", prompt="a red apple", extra_body=steps).data[0].b64_json
        process.wait_for_line(r"Request \S+-0 completed: \S+, 2 of 2 steps computed, 0 cached; \d+\.\d\d s queued, ")
        assert "red apple" not in process.output
        assert stop(process) == 0
