"""Every error is OpenAI's error object, with the status, `param` and headers that clients use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from testbed.live_server import MODEL_NAME, LiveServer, live_server
from vllm_omni.entrypoints.openai.errors import error_response
from vllm_omni.errors import QueueFullError

GENERATIONS = "/v1/images/generations"


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object, after a check that the response contains nothing else."""
    assert response.headers["content-type"] == "application/json"
    body: dict[str, dict[str, Any]] = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


BAD_FIELDS: list[tuple[str, Any]] = [
    ("prompt", None),
    ("prompt", ""),
    ("prompt", 3),
    ("prompt", ["x"]),
    ("prompt", "x" * 32_001),
    ("prompt", "word " * 600),
    ("prompt", "\ud800"),
    ("n", 0),
    ("n", 11),
    ("n", "4"),
    ("n", 1.5),
    ("n", True),
    ("n", -(10**30)),
    ("size", "64"),
    ("size", "64/64"),
    ("size", "64x64x64"),
    ("size", "0x64"),
    ("size", "-64x64"),
    ("size", "65x64"),
    ("size", "8x64"),
    ("size", "999999x999999"),
    ("size", "9" * 5000 + "x64"),
    ("size", "٦٤x٦٤"),
    ("size", 64),
    ("output_format", "gif"),
    ("output_compression", 101),
    ("output_compression", -1),
    ("output_compression", 50),
    ("response_format", "bytes"),
    ("background", "transparent"),
    ("background", "red"),
    ("quality", "best"),
    ("style", "bold"),
    ("moderation", "off"),
    ("complexity", "max"),
    ("user", 1),
    ("stream", "true"),
    ("stream", 1),
    ("partial_images", 4),
    ("partial_images", -1),
    ("negative_prompt", 5),
    ("negative_prompt", "x" * 32_001),
    ("num_inference_steps", 0),
    ("num_inference_steps", 201),
    ("num_inference_steps", 10**400),
    ("num_inference_steps", "20"),
    ("guidance_scale", 3.5),
    ("guidance_scale", "high"),
    ("true_cfg_scale", -1),
    ("true_cfg_scale", 1e300),
    ("true_cfg_scale", 10**400),
    ("true_cfg_scale", float("nan")),
    ("true_cfg_scale", float("inf")),
    ("cfg_normalization", "high"),
    ("cfg_normalization", [1]),
    ("cfg_normalization", float("nan")),
    ("seed", -2),
    ("seed", 2**63),
    ("seed", 1.0),
    ("max_sequence_length", 0),
    ("max_sequence_length", 513),
    ("max_sequence_length", "512"),
    ("lora", {"name": "style", "scale": 1}),
    ("lora", "style"),
    ("flow_shift", 1000.0),
    ("flow_shift", "3"),
    ("priority", 2**40),
    ("priority", "first"),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=[f"{f}-{str(v)[:12]!a}" for f, v in BAD_FIELDS])
def test_bad_fields_are_refused_before_the_queue(
    server: LiveServer, http: httpx.Client, field: str, value: Any
) -> None:
    num_before = len(server.device.prompts)
    body = json.dumps({"prompt": "x", field: value})
    response = http.post(GENERATIONS, content=body, headers={"content-type": "application/json"})
    error = error_of(response)
    assert response.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", field)
    assert len(error["message"]) < 500
    assert response.headers["x-should-retry"] == "false"
    assert len(server.device.prompts) == num_before


def test_sdk_raises_bad_request_with_the_message(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.images.generate(prompt="x", size="100x70")
    assert caught.value.param == "size"
    assert caught.value.code == "invalid_value"
    assert "the nearest valid size is 96x64" in caught.value.message


def test_advice_that_http_can_follow(http: httpx.Client) -> None:
    """A prompt that is longer than the limit may get a higher one."""
    body = {"prompt": "word " * 20, "max_sequence_length": 10}
    message = error_of(http.post(GENERATIONS, json=body))["message"]
    assert message.endswith("at most 10 are accepted (max_sequence_length, which may be up to 512)")
    answer = http.post(GENERATIONS, json={**body, "max_sequence_length": 512})
    assert (answer.status_code, answer.headers.get("x-omni-ignored-fields")) == (200, None)


def test_advice_names_what_http_takes(http: httpx.Client) -> None:
    body = {"prompt": "x", "guidance_scale": 3.5}
    message = error_of(http.post(GENERATIONS, json=body))["message"]
    refusal, _, taken = message.partition("; it takes ")
    assert refusal == "guidance_scale 3.5: this model has no such parameter"
    names = taken.split(", ")
    assert names == [
        "true_cfg_scale",
        "height",
        "width",
        "num_inference_steps",
        "negative_prompt",
        "flow_shift",
        "max_sequence_length",
    ]
    for name in names:
        answer = http.post(GENERATIONS, json={"prompt": "x", name: None})
        assert "x-omni-ignored-fields" not in answer.headers, "a field that is known"


@pytest.mark.parametrize(("size", "nearest"), [("8x64", "16x64"), ("4096x2048", "1456x720")])
def test_too_small_and_too_large_sizes_are_told_the_nearest(http: httpx.Client, size: str, nearest: str) -> None:
    message = error_of(http.post(GENERATIONS, json={"prompt": "x", "size": size}))["message"]
    assert message.endswith(f"the nearest valid size is {nearest}")
    assert http.post(GENERATIONS, json={"prompt": "x", "size": nearest, "num_inference_steps": 1}).status_code == 200


def test_a_malformed_size_is_told_the_form_not_a_pattern(http: httpx.Client) -> None:
    message = error_of(http.post(GENERATIONS, json={"prompt": "x", "size": "64/64"}))["message"]
    assert message == "size: takes auto or WIDTHxHEIGHT in pixels, such as 1024x1024, got '64/64'"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"height": 64}, "size", "height and width go together, got height alone"),
        ({"width": 64, "size": "64x64"}, "size", "got width alone"),
        ({"height": 64, "width": 128, "size": "64x128"}, "size", "size is 64x128, but width and height say 128x64"),
        ({"height": 70, "width": 100}, "size", "the nearest valid size is 96x64"),
        ({"height": 0, "width": 64}, "height", "greater than or equal to 1"),
        ({"height": 10**400, "width": 64}, "height", "less than or equal to"),
        ({"num_outputs_per_prompt": 2, "n": 1}, "n", "n is 1, but num_outputs_per_prompt 2"),
        ({"num_outputs_per_prompt": 11}, "num_outputs_per_prompt", "less than or equal to 10"),
    ],
)
def test_size_and_n_by_two_names(http: httpx.Client, fields: dict[str, Any], param: str, words: str) -> None:
    response = http.post(GENERATIONS, json={"prompt": "x", **fields})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["param"] == param
    assert words in error["message"]


def test_seed_plus_n_must_fit(http: httpx.Client) -> None:
    response = http.post(GENERATIONS, json={"prompt": "x", "seed": 2**63 - 2, "n": 10})
    assert response.status_code == 400
    assert error_of(response)["param"] == "seed"


def test_unknown_model(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.images.generate(prompt="x", model="gpt-image-1")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert MODEL_NAME in caught.value.message
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.images.generate(prompt="x", model="m" * 100_000)
    assert len(caught.value.message) < 500, "nothing long is echoed"


@pytest.mark.parametrize(("output_format", "size"), [("webp", "16400x16"), ("jpeg", "65520x16")])
def test_sides_that_a_format_cannot_hold(http: httpx.Client, output_format: str, size: str) -> None:
    response = http.post(GENERATIONS, json={"prompt": "x", "output_format": output_format, "size": size})
    assert response.status_code == 400
    assert error_of(response)["param"] == "size"


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b'{"prompt": ', "application/json"),
        (b"\xff\xfe", "application/json"),
        (b'["prompt"]', "application/json"),
        (b"null", "application/json"),
        (b"", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "application/json"),
        (b"prompt=x", "application/x-www-form-urlencoded"),
        (b'{"prompt": "x"}', "text/plain"),
    ],
)
def test_bodies_that_are_no_json_object(http: httpx.Client, content: bytes, content_type: str) -> None:
    response = http.post(GENERATIONS, content=content, headers={"content-type": content_type})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert (error["type"], error["param"]) == ("invalid_request_error", None)


def test_body_too_large_declared(http: httpx.Client) -> None:
    response = http.post(GENERATIONS, json={"prompt": "x", "padding": "x" * 2**20})
    assert response.status_code == 413
    assert error_of(response)["type"] == "invalid_request_error"


def test_body_too_large_streamed(http: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(40):
            yield b"x" * 2**15

    response = http.post(GENERATIONS, content=chunks(), headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("PUT", "/v1/videos", 405),
        ("POST", "/v1/completions", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", GENERATIONS, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/images/variations", 404),
        ("GET", "/v1/images/files/unknown.png", 404),
        ("GET", "/v1/images/files/..%2F..%2Fetc%2Fpasswd", 404),
        ("GET", "/v1/images/files/", 404),
    ],
)
def test_routes_that_are_not_there(http: httpx.Client, method: str, path: str, status: int) -> None:
    response = http.request(method, path)
    assert response.status_code == status
    assert error_of(response)["type"] == "invalid_request_error"
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("POST", "/v1/load_lora_adapter", "--lora-modules"),
        ("POST", "/v1/unload_lora_adapter", "--lora-modules"),
    ],
)
def test_routes_that_say_what_there_is_instead(http: httpx.Client, method: str, path: str, words: str) -> None:
    response = http.request(method, path)
    assert response.status_code == 501
    error = error_of(response)
    assert (error["type"], error["param"], error["code"]) == ("server_error", None, "not_implemented")
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert response.headers["x-should-retry"] == "false"


def test_edits_say_where_to_go(sdk: openai.OpenAI) -> None:
    """The error names the other route, also for an upload beyond the limit of JSON bodies."""
    with pytest.raises(openai.BadRequestError, match="images/generations"):
        sdk.images.edit(image=("big.png", b"\0" * 3 * 2**20, "image/png"), prompt="x")


def test_out_of_memory_is_a_500_that_is_not_repeated(server: LiveServer) -> None:
    num_before = len(server.device.prompts)
    with (
        openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=2) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.images.generate(prompt="fail-at-2")
    assert caught.value.type == "server_error"
    assert len(server.device.prompts) == num_before + 1


def test_bug_of_ours_is_a_500_that_tells_nothing() -> None:
    def add_broken_route(app: FastAPI) -> None:
        @app.get("/broken")
        async def broken() -> None:
            raise ZeroDivisionError("secret")

    with live_server(wrap=add_broken_route) as running:
        response = httpx.get(f"{running.url}/broken", headers={"x-request-id": "r-1"})
    assert response.status_code == 500
    error = error_of(response)
    assert error["type"] == "server_error"
    assert "secret" not in error["message"]
    assert response.headers["x-request-id"] == "r-1"


def test_full_queue_is_429_with_retry_after() -> None:
    with (
        live_server(max_num_queued_reqs=2) as running,
        openai.OpenAI(api_key="none", base_url=f"{running.url}/v1", max_retries=0) as client,
    ):
        running.call(running.device.pause)
        with client.images.generate(prompt="x", stream=True), pytest.raises(openai.RateLimitError) as caught:
            client.images.generate(prompt="x", n=2)
        assert caught.value.code == "queue_full"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert "x-should-retry" not in caught.value.response.headers
        running.call(running.device.resume)
        running.wait_until(lambda: running.num_unfinished() == 0)
        client.images.generate(prompt="x", n=2)


@pytest.mark.parametrize(
    ("seconds", "header"), [(None, "1"), (0.0, "1"), (0.2, "1"), (1.0, "1"), (1.2, "2"), (59.01, "60")]
)
def test_nobody_is_asked_back_too_early(seconds: float | None, header: str) -> None:
    """The header takes whole seconds."""
    response = error_response(QueueFullError("the queue is full", retry_after=seconds))
    assert (response.status_code, response.headers["retry-after"]) == (429, header)


def test_draining_is_503_with_retry_after() -> None:
    with (
        live_server() as running,
        openai.OpenAI(api_key="none", base_url=f"{running.url}/v1", max_retries=0) as client,
    ):
        running.call(running.omni.begin_drain)
        with pytest.raises(openai.InternalServerError) as caught:
            client.images.generate(prompt="x")
        assert caught.value.status_code == 503
        assert int(caught.value.response.headers["retry-after"]) >= 1


def test_request_id_is_echoed_sanitised(http: httpx.Client) -> None:
    for path, status in (("/health", 200), ("/nowhere", 404)):
        response = http.get(path, headers={"x-request-id": "run-7/a<b> c"})
        assert (response.status_code, response.headers["x-request-id"]) == (status, "run-7/abc")


def test_every_answer_has_a_request_id(http: httpx.Client) -> None:
    stream = {"json": {"prompt": "x", "stream": True}}
    calls: list[tuple[str, str, dict[str, Any], int]] = [
        ("GET", "/health", {}, 200),
        ("GET", "/health", {"headers": {"x-request-id": "<>"}}, 200),
        ("GET", "/nowhere", {}, 404),
        ("DELETE", "/health", {}, 405),
        ("POST", "/v1/images/generations", {"content": b"{"}, 400),
        ("POST", "/v1/images/generations", stream, 200),
        ("POST", "/v1/load_lora_adapter", {}, 501),
    ]
    answers = [http.request(method, path, **arguments) for method, path, arguments, _ in calls]
    assert [answer.status_code for answer in answers] == [status for *_, status in calls]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == len(calls)
    assert {len(one) for one in ids} == {32}


def test_adapters_are_loaded_only_with_a_flag(http: httpx.Client) -> None:
    for route in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        refused = http.post(route, json={"lora_name": "ink", "lora_path": "ink"})
        assert refused.status_code == 404
        assert "--enable-lora-loading" in error_of(refused)["message"]
    paths = http.get("/openapi.json").json()["paths"]
    assert {path for path in paths if "lora" in path} == {"/v1/loras"}
