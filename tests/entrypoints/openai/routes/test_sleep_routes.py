"""/sleep, /wake_up and /is_sleeping: requests are kept, probes and refusals are clear, keys protect the routes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from testbed.live_server import FAKE_VIDEO_INFO, STEPS, LiveServer, expected_picture, live_server
from testbed.patience import GUARD_SECONDS, wait_for
from tests.entrypoints.openai.routes.test_image_generations import pixels
from tests.entrypoints.openai.routes.test_probes_and_metrics import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
GENERATIONS = "/v1/images/generations"
STATES = ("awake", "weights_offloaded", "discard_all")


@pytest.fixture
def sleepy() -> Iterator[LiveServer]:
    with live_server(enable_sleep_mode=True) as running:
        yield running


def call(server: LiveServer, method: str, path: str, **values: Any) -> httpx.Response:
    return httpx.request(method, server.url + path, **values)


def is_sleeping(server: LiveServer) -> bool:
    answer = call(server, "GET", "/is_sleeping").json()
    assert answer.keys() == {"is_sleeping"}
    return bool(answer["is_sleeping"])


@pytest.mark.parametrize("query", ["", "?level=1", "?level=2&mode=keep"])
def test_a_server_sleeps_and_wakes(sleepy: LiveServer, query: str) -> None:
    level = 2 if "2" in query else 1
    sdk = openai.OpenAI(api_key="none", base_url=f"{sleepy.url}/v1", max_retries=0)
    assert not is_sleeping(sleepy)
    answer = call(sleepy, "POST", f"/sleep{query}")
    assert (answer.status_code, answer.json()) == (200, {"status": "sleeping", "level": level})
    assert is_sleeping(sleepy)
    with pytest.raises(openai.InternalServerError, match="the engine is sleeping, and takes requests after wake_up"):
        sdk.images.generate(prompt="x")
    ready = call(sleepy, "GET", "/ready")
    assert (ready.status_code, ready.json()["error"]["message"]) == (
        503,
        "The engine takes no requests: it is sleeping.",
    )
    assert call(sleepy, "GET", "/health").json() == {"status": "sleeping"}
    assert len(list(sdk.models.list())) == 2
    shown = read_metrics(sleepy)
    assert [shown[f"vllm:engine_sleep_state{{sleep_state={s}}}"] for s in STATES] == [0, level == 1, level == 2]
    answer = call(sleepy, "POST", "/wake_up")
    assert (answer.status_code, answer.json()) == (200, {"status": "awake"})
    assert not is_sleeping(sleepy)
    shown = read_metrics(sleepy)
    assert [shown[f"vllm:engine_sleep_state{{sleep_state={s}}}"] for s in STATES] == [1, 0, 0]
    made = sdk.images.generate(prompt="x", extra_body={"seed": 3}).data
    assert made is not None
    assert np.array_equal(pixels(made[0].b64_json), expected_picture(3))
    assert call(sleepy, "GET", "/ready").status_code == 200


def test_a_stream_lives_through_a_sleep() -> None:
    with live_server(enable_sleep_mode=True, settings={"keep_alive_seconds": 0.01}) as running:
        running.call(running.device.pause)
        body = {"prompt": "x", "seed": 4, "stream": True, "size": "64x64"}
        with httpx.stream("POST", running.url + GENERATIONS, json=body) as stream:
            lines = stream.iter_lines()
            running.call(running.device.run_plans, 2)
            sleeping = asyncio.run_coroutine_threadsafe(running.omni.sleep(1), running.loop)
            running.wait_until(lambda: running.omni.status().state == "sleeping")
            running.call(running.device.resume)  # only the plans in flight are left
            assert sleeping.result(GUARD_SECONDS) == 1
            num_plans = running.device.num_plans
            assert next(line for line in lines if line).startswith(":"), "a comment keeps the connection open"
            assert running.device.num_plans == num_plans < STEPS + 2
            call(running, "POST", "/wake_up")
            assert [line for line in lines if line.startswith("event:")] == ["event: image_generation.completed"]


@pytest.mark.parametrize(
    ("path", "message", "param"),
    [
        ("/sleep?level=0", "level takes 1 or 2, got '0'", "level"),
        ("/sleep?level=two", "level takes 1 or 2, got 'two'", "level"),
        ("/sleep?mode=abort", "mode takes keep (requests under way are replayed after waking), got 'abort'", "mode"),
        ("/sleep?depth=1", "the route takes level and mode, got 'depth'", "depth"),
        ("/wake_up?tags=weights", "tags: the server wakes up as a whole; leave tags out", "tags"),
        ("/wake_up?level=1", "the route takes no parameters, got 'level'", "level"),
    ],
)
def test_wrong_parameters(sleepy: LiveServer, path: str, message: str, param: str) -> None:
    answer = call(sleepy, "POST", path)
    error = answer.json()["error"]
    assert (answer.status_code, error["message"], error["param"]) == (400, message, param)
    assert not is_sleeping(sleepy)


def test_without_the_flag_the_routes_name_it(server: LiveServer) -> None:
    for method, path in (("POST", "/sleep?level=7"), ("POST", "/wake_up"), ("GET", "/is_sleeping")):
        answer = call(server, method, path)
        assert answer.status_code == 404
        assert "--enable-sleep-mode" in answer.json()["error"]["message"]
    assert "/sleep" not in call(server, "GET", "/openapi.json").json()["paths"]


def test_before_the_engine_is_warm_and_while_it_drains() -> None:
    with live_server(start_engine=False, enable_sleep_mode=True) as running:
        assert call(running, "POST", "/sleep").status_code == 503
        assert not is_sleeping(running)
    with live_server(enable_sleep_mode=True) as running:
        running.call(running.omni.begin_drain)
        answer = call(running, "POST", "/sleep")
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "the engine is draining")


def test_a_wake_up_that_fails_is_a_503(sleepy: LiveServer) -> None:
    sleepy.device._wake_failures.append("the weights take 40.0 GB of device memory: out of memory")
    call(sleepy, "POST", "/sleep")
    answer = call(sleepy, "POST", "/wake_up")
    assert answer.status_code == 503
    assert "sleeps on: the weights take 40.0 GB" in answer.json()["error"]["message"]
    assert is_sleeping(sleepy)
    assert call(sleepy, "POST", "/wake_up").status_code == 200


def test_video_jobs_wait_in_the_store() -> None:
    with live_server(info=FAKE_VIDEO_INFO, enable_sleep_mode=True) as running:
        sdk = openai.OpenAI(api_key="none", base_url=f"{running.url}/v1", max_retries=0)
        call(running, "POST", "/sleep")
        num_plans = running.device.num_plans
        video = sdk.videos.create(prompt="x", size="64x64")
        assert running.jobs is not None
        assert sdk.videos.retrieve(video.id).status == "queued"
        assert running.device.num_plans == num_plans
        call(running, "POST", "/wake_up")
        wait_for(lambda: sdk.videos.retrieve(video.id).status == "completed")
