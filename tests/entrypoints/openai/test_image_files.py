"""`response_format=url`: the link works, expires, and cannot be guessed; the folder stays small and goes."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from pathlib import Path
from unittest.mock import patch

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.entrypoints.openai.live_server import expected_picture, live_server
from vllm_omni.entrypoints.openai.files import FileStore


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("output_format", "content_type"), [("png", "image/png"), ("jpeg", "image/jpeg")])
def test_url_can_be_fetched(sdk: openai.OpenAI, output_format: str, content_type: str) -> None:
    response = sdk.images.generate(
        prompt="x", n=2, response_format="url", output_format=output_format, extra_body={"seed": 4}
    )  # type: ignore[call-overload]
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


def test_url_carries_the_root_path_and_dies_with_the_server() -> None:
    stores = []

    class RecordedStore(FileStore):
        def __init__(self, *args: float) -> None:
            super().__init__(*args)
            stores.append(self)

    with (
        patch("vllm_omni.entrypoints.openai.app.FileStore", RecordedStore),
        live_server(settings={"root_path": "/images-api"}) as running,
    ):
        body = {"prompt": "x", "response_format": "url"}
        url = httpx.post(f"{running.url}/v1/images/generations", json=body).json()["data"][0]["url"]
        assert url.startswith(f"{running.url}/images-api/v1/images/files/")
        assert httpx.get(url.replace("/images-api", "")).status_code == 200
        folder = stores[0].folder
        assert folder is not None
        assert len(list(folder.iterdir())) == 1
    assert not folder.exists()


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


async def test_store_keeps_to_its_bytes_and_time() -> None:
    clock = Clock()
    store = FileStore(ttl_seconds=10, max_bytes=100, clock=clock)
    try:
        first, second = await store.put(b"a" * 60, "image/png"), await store.put(b"b" * 40, "image/webp")
        assert first.endswith(".png")
        assert second.endswith(".webp")
        assert await store.get(first) == (b"a" * 60, "image/png")
        clock.now = 5
        third = await store.put(b"c" * 30, "image/png")
        assert await store.get(first) is None
        assert await store.get(second) == (b"b" * 40, "image/webp")
        clock.now = 10
        assert await store.get(second) is None
        assert await store.get(third) == (b"c" * 30, "image/png")
        huge = await store.put(b"d" * 500, "image/png")
        assert await store.get(third) is None
        assert await store.get(huge) == (b"d" * 500, "image/png")
        assert store.folder is not None
        assert [path.name for path in store.folder.iterdir()] == [huge]
        assert os.stat(store.folder).st_mode & 0o077 == 0
    finally:
        store.close()
    assert not store.folder.exists()


async def test_a_file_whose_client_left_while_it_was_written_goes_too() -> None:
    clock, may_write = Clock(), threading.Event()
    store = FileStore(ttl_seconds=10, max_bytes=100, clock=clock)
    write_bytes = Path.write_bytes

    def write_when_told(path: Path, data: bytes) -> int:
        may_write.wait(20)
        return write_bytes(path, data)

    try:
        with patch.object(Path, "write_bytes", write_when_told):
            putting = asyncio.create_task(store.put(b"x", "image/png"))
            await asyncio.sleep(0)  # it has begun to write
            putting.cancel()
            await asyncio.gather(putting, return_exceptions=True)
            may_write.set()
            await asyncio.get_running_loop().shutdown_default_executor()  # it has written
        assert store.folder is not None
        assert len(list(store.folder.iterdir())) == 1
        clock.now = 10
        store.sweep()
        assert list(store.folder.iterdir()) == []
    finally:
        store.close()


async def test_ids_are_long_and_random() -> None:
    store = FileStore(ttl_seconds=10, max_bytes=100)
    try:
        ids = {await store.put(b"x", "image/png") for _ in range(20)}
    finally:
        store.close()
    assert len(ids) == 20
    assert all(len(file_id) >= 32 for file_id in ids)
