"""The order of the middleware, and the headers that scripts of allowed origins can read."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
from fastapi import FastAPI

import vllm_omni
from testbed.live_server import live_server
from vllm_omni.entrypoints.openai.settings import HttpOptions
from vllm_omni.entrypoints.server.middleware import EXPOSED_HEADERS, add_middleware

ORIGIN = "https://app.example"


def with_cors(app: FastAPI) -> None:
    add_middleware(app, HttpOptions(allowed_origins=(ORIGIN,), api_key=("k",)))


def test_browsers_can_read_our_headers_and_every_answer_has_an_id() -> None:
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    with live_server(wrap=with_cors) as server, httpx.Client(base_url=server.url, headers={"Origin": ORIGIN}) as client:
        allowed = client.options("/v1/images/generations", headers=preflight)
        forbidden = client.options("/v1/images/generations", headers={**preflight, "Origin": "https://else.example"})
        refused = client.post("/v1/images/generations", json={"prompt": "x"})
    assert [answer.status_code for answer in (allowed, forbidden, refused)] == [200, 400, 401]
    assert len({answer.headers["x-request-id"] for answer in (allowed, forbidden, refused)}) == 3
    assert refused.headers["access-control-allow-origin"] == ORIGIN
    assert refused.headers["access-control-expose-headers"] == ", ".join(EXPOSED_HEADERS)


def test_every_header_of_ours_is_exposed() -> None:
    """All headers that the sources name are in the list."""
    sources = Path(vllm_omni.__file__).parent.rglob("*.py")
    pattern = re.compile(
        r"""["']((?:x-omni|openai)-[a-z-]+|x-request-id|x-should-retry|retry-after|www-authenticate)["']""", re.I
    )
    named = {name.lower() for source in sources for name in pattern.findall(source.read_text())}
    assert {"x-omni-ignored-fields", "x-request-id", "retry-after"} <= named
    assert named <= set(EXPOSED_HEADERS)


def test_keys_protect_the_routes_that_change_the_server() -> None:
    options = HttpOptions(api_key=("secret",))
    with live_server(
        enable_sleep_mode=True, settings={"requires_api_key": True}, wrap=lambda app: add_middleware(app, options)
    ) as running:
        for path in ("/sleep", "/sleep/", "/wake_up"):
            for headers in ({}, {"authorization": "Bearer wrong"}):
                answer = httpx.request("POST", running.url + path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
        assert running.omni.status().state == "running"
        key = {"authorization": "Bearer secret"}
        assert httpx.request("POST", f"{running.url}/sleep", headers=key).status_code == 200
        assert running.omni.status().state == "sleeping"
        assert httpx.request("POST", f"{running.url}/wake_up", headers=key).status_code == 200
        paths = httpx.request("GET", f"{running.url}/openapi.json").json()["paths"]
        assert "security" in paths["/sleep"]["post"]
        assert "security" not in paths["/is_sleeping"]["get"]
