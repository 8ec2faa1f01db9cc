"""`/v1/videos/{id}/content`: ranges and versions of a stored file, over real HTTP."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest

from testbed.live_server import FAKE_VIDEO_INFO, LiveServer, live_server
from tests.entrypoints.openai.routes.test_image_errors import error_of
from tests.entrypoints.openai.routes.videos import VIDEOS, Paused, created, ended, made


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(info=FAKE_VIDEO_INFO) as running:
        yield running


@pytest.fixture(scope="module")
def content(server: LiveServer) -> str:
    """Path of the content of a completed video."""
    with httpx.Client(base_url=server.url) as client:
        return f"{VIDEOS}/{made(client)['id']}/content"


def test_ranges_of_the_stored_file(http: httpx.Client, content: str) -> None:
    whole = http.get(content)
    size = len(whole.content)
    assert (whole.status_code, whole.headers["content-length"]) == (200, str(size))
    assert (whole.headers["accept-ranges"], whole.headers["content-type"]) == ("bytes", "video/mp4")
    part = http.get(content, headers={"range": "bytes=5-104"})
    assert (part.status_code, part.content) == (206, whole.content[5:105])
    assert part.headers["content-range"] == f"bytes 5-104/{size}"
    end = http.get(content, headers={"range": "bytes=-7", "if-range": whole.headers["etag"]})
    assert (end.status_code, end.content) == (206, whole.content[-7:])
    behind = http.get(content, headers={"range": f"bytes={size}-"})
    assert (behind.status_code, behind.headers["content-range"]) == (416, f"bytes */{size}")
    assert error_of(behind)["type"] == "invalid_request_error"


def test_a_known_file_is_not_sent_again(http: httpx.Client, content: str) -> None:
    etag = http.get(content).headers["etag"]
    same = http.get(content, headers={"if-none-match": etag})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", etag)
    thumbnail = http.get(content, params={"variant": "thumbnail"}, headers={"if-none-match": etag})
    assert (thumbnail.status_code, thumbnail.headers["content-type"]) == (200, "image/webp")


def test_head_has_the_headers_of_get(http: httpx.Client, content: str) -> None:
    whole, head = http.get(content), http.head(content)
    assert (head.status_code, head.content) == (200, b"")
    differing = ("date", "x-request-id")
    assert {k: v for k, v in head.headers.items() if k not in differing} == {
        k: v for k, v in whole.headers.items() if k not in differing
    }


def test_content_before_completion_is_a_404_with_the_status(server: LiveServer, http: httpx.Client) -> None:
    with Paused(server):
        video = created(http)
        response = http.get(f"{VIDEOS}/{video['id']}/content")
        assert response.status_code == 404
        assert re.search("its status is (queued|in_progress)", error_of(response)["message"])
        remix = http.post(f"{VIDEOS}/{video['id']}/remix", json={"prompt": "x"})
        assert remix.status_code == 400
        assert re.search("status of .* is (queued|in_progress)", error_of(remix)["message"])
    assert ended(http, video["id"])["status"] == "completed"


def test_an_unknown_variant_is_refused(http: httpx.Client, content: str) -> None:
    response = http.get(content, params={"variant": "poster"})
    assert (response.status_code, error_of(response)["param"]) == (400, "variant")
    assert http.get(content, params={"variant": ""}).status_code == 200
