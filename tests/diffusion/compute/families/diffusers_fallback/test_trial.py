"""The trial at start: a default request as clients send it, of the size that the pipeline really makes."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from testbed.tiny_whole_models import cog_view_4
from tests.diffusion.compute.families.diffusers_fallback.conftest import ModelOf
from vllm_omni import Omni
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.families.diffusers_fallback.pipeline import DiffusersPipeline
from vllm_omni.diffusion.compute.startup import rates
from vllm_omni.diffusion.compute.startup.rates import Sample
from vllm_omni.diffusion.compute.step.pipeline import Picture
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.errors import ConfigError


def start(model: Path, **settings: Any) -> ModelRunner:
    runner = ModelRunner(OmniDiffusionConfig(model=str(model), **settings), load_model_info(str(model)))
    runner.start()
    return runner


def test_a_model_that_cannot_encode_an_empty_prompt_needs_other_defaults(tmp_path: Path) -> None:
    """Guidance without a negative prompt encodes an empty one, in each default request."""
    cog_view_4(encodes_empty=False).save_pretrained(tmp_path)
    defaults = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 64}
    (tmp_path / "default_sampling_params.json").write_text(json.dumps(defaults))
    with pytest.raises(ConfigError, match="the CogView4Pipeline fails on a default request: "):
        start(tmp_path)
    start(tmp_path, default_sampling_params={"guidance_scale": 1.0})
    start(tmp_path, default_sampling_params={"negative_prompt": "blue"})


def test_rates_belong_to_the_size_that_is_made(model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sana makes a size of its table, whatever is asked for: trials of other sizes would all take as long."""
    asked: list[tuple[int, int]] = []
    measured: list[Sample] = []
    decode, fit_line = DiffusersPipeline.decode, rates.fit_line

    def seen(pipeline: DiffusersPipeline, requests: Sequence[DiffusionRequest], latents: Any) -> list[Picture]:
        asked.extend((request.height, request.width) for request in requests)
        return decode(pipeline, requests, latents)

    def fitted(samples: Any) -> tuple[float, float]:
        measured.extend(samples)
        return fit_line(samples)

    monkeypatch.setattr(DiffusersPipeline, "decode", seen)
    monkeypatch.setattr(rates, "fit_line", fitted)
    start(model_of("SanaPipeline"))
    assert set(asked) == {(64, 64)}  # its folder's default
    assert [sample.tokens for sample in measured] == [16 * 16]  # for 512x512


def test_a_default_that_the_tokenizers_cannot_take_is_told(model_of: ModelOf, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING),
        Omni(model=str(model_of("StableDiffusion3Pipeline")), distributed_executor_backend="uni", progress_bar=False),
    ):
        pass
    told = [record.getMessage() for record in caplog.records if record.name == "vllm_omni.omni"]
    assert told == [
        "max_sequence_length is 128 by default, the most that the model's tokenizers take; by itself the "
        "StableDiffusion3Pipeline has 256"
    ]
