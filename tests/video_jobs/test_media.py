"""`MediaStore` on a folder and in memory."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vllm_omni.video_jobs.media import PIECE_BYTES, MediaNotFoundError, MediaStore


@pytest.fixture(params=["folder", "memory"])
async def media(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[MediaStore]:
    urls = {"folder": str(tmp_path / "media"), "memory": f"memory://{secrets.token_hex(8)}"}
    store = MediaStore.open(urls[request.param])
    yield store
    await store.close()


async def test_a_file_and_bytes_come_back(media: MediaStore, tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(b"a video")
    await media.put("video_1/1/video.mp4", tmp_path / "video.mp4")
    await media.put("video_1/inputs/0.png", b"a picture")
    assert await media.get("video_1/1/video.mp4") == b"a video"
    assert await media.get("video_1/inputs/0.png") == b"a picture"
    assert (await media.info("video_1/inputs/0.png")).size == 9


async def test_a_file_is_read_in_pieces_and_ranges(media: MediaStore) -> None:
    data = secrets.token_bytes(2 * PIECE_BYTES + 100)
    await media.put("video_1/1/video.mp4", data)
    pieces = [piece async for piece in media.read("video_1/1/video.mp4")]
    assert [len(piece) for piece in pieces] == [PIECE_BYTES, PIECE_BYTES, 100]
    assert b"".join(pieces) == data
    for start, end in ((0, 1), (5, PIECE_BYTES + 7), (len(data) - 1, None), (len(data), None), (3, 3)):
        assert b"".join([piece async for piece in media.read("video_1/1/video.mp4", start, end)]) == data[start:end]


async def test_a_job_is_deleted_as_one_tree(media: MediaStore) -> None:
    for key in ("video_1/inputs/0.png", "video_1/2/video.mp4", "video_12/1/video.mp4"):
        await media.put(key, b"data")
    await media.delete_tree("video_1")
    await media.delete_tree("video_1")
    for key in ("video_1/inputs/0.png", "video_1/2/video.mp4"):
        with pytest.raises(MediaNotFoundError, match=f"has no file {key}"):
            await media.get(key)
    assert await media.get("video_12/1/video.mp4") == b"data"
