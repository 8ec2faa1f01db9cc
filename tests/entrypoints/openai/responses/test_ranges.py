"""Range and conditional requests for a file, as RFC 9110 says."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.responses import Response

from vllm_omni.entrypoints.openai.errors import install_error_handlers
from vllm_omni.entrypoints.openai.metrics import PrometheusObserver
from vllm_omni.entrypoints.openai.responses.ranges import RangedFile, respond

DATA = bytes(range(100))
ETAG = '"version-1"'


async def read(start: int, end: int) -> AsyncGenerator[bytes, None]:
    for position in range(start, end, 7):
        yield DATA[position : min(position + 7, end)]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = FastAPI()

    @app.head("/file")
    @app.get("/file")
    async def file(request: Request) -> Response:
        return respond(RangedFile(len(DATA), ETAG, "video/mp4", read), request, {"x-extra": "1"})

    @app.get("/empty")
    async def empty(request: Request) -> Response:
        return respond(RangedFile(0, ETAG, "video/mp4", read), request, {})

    install_error_handlers(app, PrometheusObserver("m"))
    with TestClient(app) as running:
        yield running


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=90-", 90, 100),
        ("bytes=90-5000", 90, 100),
        ("bytes=-1", 99, 100),
        ("bytes=-5000", 0, 100),
        ("Bytes = 3 - 4", 3, 5),
        ("bytes=0-" + "9" * 5000, 0, 100),
    ],
)
def test_a_range_is_served(client: TestClient, asked: str, start: int, end: int) -> None:
    response = client.get("/file", headers={"range": asked})
    assert (response.status_code, response.content) == (206, DATA[start:end])
    assert response.headers["content-range"] == f"bytes {start}-{end - 1}/100"
    assert response.headers["content-length"] == str(end - start)
    assert response.headers["content-type"] == "video/mp4"


@pytest.mark.parametrize("asked", ["", "bytes=-", "bytes=9-3", "bytes=0-1,4-5", "items=0-1", "bytes=a-b", "bytes=٣-٤"])
def test_other_ranges_get_the_whole_file(client: TestClient, asked: str) -> None:
    response = client.get("/file", headers={b"range": asked.encode()})
    assert (response.status_code, response.content) == (200, DATA)
    assert "content-range" not in response.headers
    assert (response.headers["accept-ranges"], response.headers["x-extra"]) == ("bytes", "1")


@pytest.mark.parametrize(
    ("path", "asked", "size"),
    [
        ("/file", "bytes=100-", 100),
        ("/file", "bytes=5000-6000", 100),
        ("/file", "bytes=-0", 100),
        ("/file", "bytes=" + "9" * 5000 + "-", 100),
        ("/empty", "bytes=0-", 0),
        ("/empty", "bytes=-3", 0),
    ],
)
def test_a_range_behind_the_end_is_an_error_object(client: TestClient, path: str, asked: str, size: int) -> None:
    response = client.get(path, headers={"range": asked})
    assert response.status_code == 416
    assert response.headers["content-range"] == f"bytes */{size}"
    assert f"a file of {size} bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize(("version", "status"), [(ETAG, 206), ('"other"', 200), ("Sun, 06 Nov 1994 08:49:37 GMT", 200)])
def test_a_range_of_another_version_is_the_whole_file(client: TestClient, version: str, status: int) -> None:
    response = client.get("/file", headers={"range": "bytes=1-2", "if-range": version})
    assert response.status_code == status
    assert response.content == (DATA[1:3] if status == 206 else DATA)


@pytest.mark.parametrize(
    ("tags", "status"), [(ETAG, 304), (f'"a", W/{ETAG}', 304), ("*", 304), ('"other"', 200), ("version-1", 200)]
)
def test_a_known_version_is_not_sent_again(client: TestClient, tags: str, status: int) -> None:
    response = client.get(
        "/file", headers={"if-none-match": tags, "range": "bytes=500-"} if status == 304 else {"if-none-match": tags}
    )
    assert (response.status_code, response.headers["etag"]) == (status, ETAG)
    assert response.content == (b"" if status == 304 else DATA)


def test_head_has_the_headers_alone(client: TestClient) -> None:
    response = client.head("/file", headers={"range": "bytes=1-2"})
    assert (response.status_code, response.content) == (200, b"")
    assert (response.headers["content-length"], response.headers["etag"]) == ("100", ETAG)
