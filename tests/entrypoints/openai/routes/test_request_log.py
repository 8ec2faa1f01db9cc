"""`--enable-log-requests`: one line a request, with its settings and without its prompt."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import httpx
import pytest

from testbed.fakes import make_request
from testbed.live_server import FAKE_VIDEO_INFO, live_server
from tests.entrypoints.openai.routes.videos import SYNC, made
from vllm_omni.diffusion.messages.request import LoRA
from vllm_omni.entrypoints.openai.routes.picture_service import log_request

BODY = {"prompt": "a secret garden", "size": "96x64", "n": 2, "num_inference_steps": 3, "seed": 7}


def lines_after_a_request(caplog: pytest.LogCaptureFixture, *, log_requests: bool, **body: object) -> list[str]:
    with (
        caplog.at_level(logging.INFO, "vllm_omni"),
        live_server(settings={"log_requests": log_requests}, default_sampling_params={"seed": 11}) as server,
    ):
        answer = httpx.post(f"{server.url}/v1/images/generations", json={**BODY, **body})
    assert answer.status_code == 200
    assert "secret" not in caplog.text
    return [record.message for record in caplog.records if record.message.startswith("request ")]


def test_a_request_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = lines_after_a_request(caplog, log_requests=True)
    assert re.fullmatch(r"request omni-[0-9a-f]{32}: size 96x64, steps 3, n 2, seed 7, adapter none", line)


def test_the_seed_is_the_default_one_where_none_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = lines_after_a_request(caplog, log_requests=True, seed=None)
    assert ", seed 11," in line


def test_nothing_is_logged_without_the_flag(caplog: pytest.LogCaptureFixture) -> None:
    assert lines_after_a_request(caplog, log_requests=False) == []


def test_a_video_is_one_line_with_the_id_of_its_job(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "vllm_omni"),
        live_server(info=FAKE_VIDEO_INFO, settings={"log_requests": True}) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        video = made(client, prompt="a secret garden", seed=None)
        assert client.post(SYNC, json={"prompt": "a secret garden", "seed": 3}).status_code == 200
    job, sync = (record.message for record in caplog.records if record.message.startswith("request "))
    settings = "size 64x64, frames 9, steps 4, n 1, seed {}, adapter none"
    assert job == f"request {video['id']}: {settings.format(video['seed'])}"
    assert re.fullmatch(rf"request omni-[0-9a-f]{{32}}: {settings.format(3)}", sync)
    assert "secret" not in caplog.text


def test_the_adapter_is_named(caplog: pytest.LogCaptureFixture) -> None:
    request = replace(make_request("omni-1-0", size=(64, 32), steps=5), lora=LoRA("ink", "/secret/ink", 0.8))
    with caplog.at_level(logging.INFO, "vllm_omni"):
        log_request([request])
    assert caplog.messages == ["request omni-1: size 32x64, steps 5, n 1, seed 0, adapter ink x 0.8"]
