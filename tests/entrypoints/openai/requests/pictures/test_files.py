"""`response_format=url`: the link works, expires, and cannot be guessed; memory is bounded."""

from __future__ import annotations

import io
from pathlib import Path
from unittest.mock import patch

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from testbed.live_server import expected_picture, live_server
from vllm_omni.entrypoints.openai.responses.stored_files import FileStore


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("output_format", "content_type"), [("png", "image/png"), ("jpeg", "image/jpeg")])
def test_url_can_be_fetched(sdk: openai.OpenAI, output_format: str, content_type: str) -> None:
    response = sdk.images.generate(
        prompt="x", n=2, response_format="url", output_format=output_format, extra_body={"seed": 4}
    )
    urls = [image.url for image in response.data]
    assert len(set(urls)) == 2
    assert all(image.b64_json is None for image in response.data)
    for seed, url in zip((4, 5), urls, strict=True):
        fetched = httpx.get(url)
        assert fetched.status_code == 200
        assert fetched.headers["content-type"] == content_type
        assert fetched.headers["x-content-type-options"] == "nosniff"
        image = np.asarray(Image.open(io.BytesIO(fetched.content)))
        assert image.shape == (64, 64, 3)
        if output_format == "png":
            np.testing.assert_array_equal(image, expected_picture(seed))


def test_url_carries_the_root_path() -> None:
    with live_server(settings={"root_path": "/images-api"}) as running:
        body = {"prompt": "x", "response_format": "url"}
        url = httpx.post(f"{running.url}/v1/images/generations", json=body).json()["data"][0]["url"]
        assert url.startswith(f"{running.url}/images-api/v1/images/files/")
        assert httpx.get(url.replace("/images-api", "")).status_code == 200


def test_head_tells_what_get_would_bring(http: httpx.Client) -> None:
    body = {"prompt": "x", "response_format": "url"}
    url = http.post("/v1/images/generations", json=body).json()["data"][0]["url"]
    head, get = http.head(url), http.get(url)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-type", "content-length", "cache-control"):
        assert head.headers[name] == get.headers[name]
    assert http.head("/v1/images/files/unknown.png").status_code == 404


def test_pictures_never_touch_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No temporary file is written: a killed server could not remove it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with live_server() as running:
        body = {"prompt": "x", "response_format": "url"}
        url = httpx.post(f"{running.url}/v1/images/generations", json=body).json()["data"][0]["url"]
        assert httpx.get(url).status_code == 200
        assert list(tmp_path.iterdir()) == []


def test_link_expires() -> None:
    clock = Clock()

    def store_with_clock(ttl_seconds: float, max_bytes: int) -> FileStore:
        return FileStore(ttl_seconds, max_bytes, clock)

    with (
        patch("vllm_omni.entrypoints.openai.app.FileStore", store_with_clock),
        live_server(settings={"media_ttl_seconds": 60.0}) as running,
    ):
        body = {"prompt": "x", "response_format": "url"}
        url = httpx.post(f"{running.url}/v1/images/generations", json=body).json()["data"][0]["url"]
        clock.now = 59
        assert httpx.get(url).status_code == 200
        clock.now = 60
        gone = httpx.get(url)
        assert gone.status_code == 404
        assert "error" in gone.json()


def test_store_keeps_to_its_bytes_and_time() -> None:
    clock = Clock()
    store = FileStore(ttl_seconds=10, max_bytes=100, clock=clock)

    def content(file_id: str) -> tuple[bytes, str] | None:
        file = store.get(file_id)
        return None if file is None else (file.data, file.content_type)

    first, second = store.put(b"a" * 60, "image/png"), store.put(b"b" * 40, "image/webp")
    assert first.endswith(".png")
    assert second.endswith(".webp")
    assert content(first) == (b"a" * 60, "image/png")
    clock.now = 5
    third = store.put(b"c" * 30, "image/png")
    assert content(first) is None
    assert content(second) == (b"b" * 40, "image/webp")
    clock.now = 10
    assert content(second) is None
    assert content(third) == (b"c" * 30, "image/png")
    huge = store.put(b"d" * 500, "image/png")
    assert content(third) is None
    assert content(huge) == (b"d" * 500, "image/png")


def test_ids_are_long_and_random() -> None:
    store = FileStore(ttl_seconds=10, max_bytes=100)
    ids = {store.put(b"x", "image/png") for _ in range(20)}
    assert len(ids) == 20
    assert all(len(file_id) >= 32 for file_id in ids)
