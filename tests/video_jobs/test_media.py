"""`MediaStore` on a folder, in memory and on an S3 server."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import stat
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from copy import copy
from pathlib import Path
from typing import Any

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from vllm_omni.errors import ConfigError
from vllm_omni.video_jobs.media import (
    PIECE_BYTES,
    MediaNotFoundError,
    MediaStore,
    MediaStoreError,
    MediaStoreFullError,
)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An S3 server with an empty bucket `videos`, whose address is in the variables that AWS' libraries read."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path_factory.mktemp("aws") / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path_factory.mktemp("aws") / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as variables:
        for name, value in settings.items():
            variables.setenv(name, value)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("videos")
        yield
    server.stop()


@pytest.fixture(scope="module")
def bucket(s3: None) -> Iterator[MediaStore]:
    """One connection for all tests, because each takes half a second."""
    store = MediaStore.open("s3://videos")
    yield store
    store._threads.shutdown()


@pytest.fixture(params=["folder", "memory", "s3"])
async def media(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[MediaStore]:
    name = secrets.token_hex(8)
    if request.param == "s3":
        store = copy(request.getfixturevalue("bucket"))
        store._root += f"/{name}"
        yield store
        return
    store = MediaStore.open({"folder": str(tmp_path / "media"), "memory": f"memory://{name}"}[request.param])
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


async def test_a_tree_that_several_sweeps_delete_is_gone_when_each_of_them_returns(tmp_path: Path) -> None:
    media = MediaStore.open(str(tmp_path / "media"))
    folder = tmp_path / "media" / "job"
    for number in range(20):
        (folder / str(number)).mkdir(parents=True)
        for name in range(20):
            (folder / str(number) / f"{name}.png").touch()

    async def delete() -> bool:
        await media.delete_tree("job")
        return folder.exists()

    assert await asyncio.gather(*(delete() for _ in range(4))) == [False] * 4
    await media.close()


async def test_access_is_checked_without_a_trace(media: MediaStore) -> None:
    media.check_access()
    assert not media._files.exists(media._root) or not media._files.ls(media._root)


def test_a_folder_without_space_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    media = MediaStore.open(str(tmp_path))
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConfigError, match=f"^--media-store {tmp_path}: OSError: .* No space left on device$"):
        media.check_access()


async def test_delete_removes_one_file_and_may_come_twice(media: MediaStore) -> None:
    await media.put("video_1/1/checkpoint-1.safetensors", b"old")
    await media.put("video_1/1/checkpoint-2.safetensors", b"new")
    for _ in range(2):
        await media.delete("video_1/1/checkpoint-1.safetensors")
    with pytest.raises(MediaNotFoundError):
        await media.info("video_1/1/checkpoint-1.safetensors")
    assert await media.get("video_1/1/checkpoint-2.safetensors") == b"new"


async def test_an_entity_tag_is_strong_and_changes_with_the_file(media: MediaStore) -> None:
    before = time.time()
    await media.put("video_1/1/video.mp4", b"first")
    first = await media.info("video_1/1/video.mp4")
    assert first == await media.info("video_1/1/video.mp4")
    assert first.etag.startswith('"')
    assert first.etag.endswith('"')
    assert first.modified == pytest.approx(before, abs=120)
    await media.put("video_1/1/video.mp4", b"second")
    assert (await media.info("video_1/1/video.mp4")).etag != first.etag


async def test_a_missing_file_is_one_error_for_every_reader(media: MediaStore) -> None:
    await media.put("video_1/1/video.mp4", b"a video")
    with pytest.raises(MediaNotFoundError, match="the media store has no file video_1/1"):
        await media.info("video_1/1")  # a folder
    for key in ("video_1/1/gone.mp4", "video_2/1/video.mp4"):
        with pytest.raises(MediaNotFoundError, match=f"the media store has no file {key}"):
            await media.info(key)
        with pytest.raises(MediaNotFoundError, match=f"the media store has no file {key}"):
            await media.get(key)
        with pytest.raises(MediaNotFoundError, match=f"the media store has no file {key}"):
            _ = [piece async for piece in media.read(key)]


@pytest.mark.parametrize(
    "key",
    ["", "..", "../a", "a/../b", "a/..", "/a", "a//b", "a/", "a/.b", ".", "a\\b", "a\0b", "a\nb", "é", "a b", "a?b"],
)
async def test_no_key_leads_out_of_the_store(key: str, tmp_path: Path) -> None:
    media = MediaStore.open(str(tmp_path / "media"))
    calls = [media.put(key, b"x"), media.get(key), media.info(key), media.delete(key), media.delete_tree(key)]
    for call in calls:
        with pytest.raises(ValueError, match="a media key has segments of letters"):
            await call
    with pytest.raises(ValueError, match="a media key has segments of letters"):
        _ = [piece async for piece in media.read(key)]
    await media.close()


WRONG_URLS = {
    "": "takes a folder or s3://BUCKET/PREFIX",
    "http://host/videos": "takes a folder or s3://BUCKET/PREFIX",
    "ftp://me:secret@host/videos": "'ftp://host/videos': takes a folder",
    "simplecache::s3://videos/x": "takes a folder or s3://BUCKET/PREFIX",
    "s3://": "has no bucket",
    "s3:///x": "has no bucket",
    "s3://a b/x": "has no bucket",
    "/dev/null/videos": "cannot be created: Not a directory",
    "/dev/null": "cannot be created: File exists",
}


@pytest.mark.parametrize("url", WRONG_URLS)
def test_a_wrong_url_is_refused_in_one_line_that_names_the_flag(url: str) -> None:
    with pytest.raises(ConfigError, match=WRONG_URLS[url]) as caught:
        MediaStore.open(url)
    assert str(caught.value).startswith("--media-store '")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_bucket_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(ConfigError, match=r"needs the package s3fs: pip install 'vllm-omni\[s3\]'"):
        MediaStore.open("s3://videos/x")


def test_a_bucket_that_does_not_exist_fails_the_check(s3: None) -> None:
    media = MediaStore.open("s3://nobody-made-this/x")
    with pytest.raises(ConfigError, match=r"^--media-store s3://nobody-made-this/x: .*does not exist"):
        media.check_access()


def test_missing_credentials_fail_the_check(s3: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    media = MediaStore.open("s3://videos/x")
    with pytest.raises(ConfigError, match=r"^--media-store s3://videos/x: NoCredentialsError"):
        media.check_access()


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, MediaStoreFullError), (errno.EDQUOT, MediaStoreFullError), (errno.EIO, MediaStoreError)],
)
async def test_a_full_disk_leaves_no_part_and_the_file_of_before(
    number: int,
    kind: type[MediaStoreError],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    media = MediaStore.open(str(tmp_path))
    await media.put("video_1/1/video.mp4", b"before")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(kind) as caught:
            await media.put("video_1/1/video.mp4", b"after")
    assert type(caught.value) is kind
    assert str(tmp_path) not in str(caught.value), "clients see the message"
    assert str(tmp_path) in caplog.text
    assert os.listdir(tmp_path / "video_1" / "1") == ["video.mp4"]
    assert await media.get("video_1/1/video.mp4") == b"before"
    await media.close()


async def test_a_cancelled_put_ends_when_its_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is deleted while its video is stored leaves no file: the delete comes after the write."""
    media = MediaStore.open(str(tmp_path))
    begun, go_on, sync = threading.Event(), threading.Event(), os.fsync

    def wait(descriptor: int) -> None:
        begun.set()
        assert go_on.wait(60)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", wait)
    writing = asyncio.create_task(media.put("video_1/1/video.mp4", b"a video"))
    await asyncio.to_thread(begun.wait)
    for _ in range(2):
        writing.cancel()
        done, _ = await asyncio.wait([writing], timeout=0.01)
        assert not done
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    await media.delete_tree("video_1")
    assert not os.listdir(tmp_path)
    await media.close()


async def test_files_are_read_by_their_owner_alone(tmp_path: Path) -> None:
    media = MediaStore.open(str(tmp_path / "media"))
    await media.put("video_1/inputs/0.png", b"a picture")
    assert (tmp_path / "media").stat().st_mode & 0o777 == 0o700
    await media.close()


async def test_a_stored_file_outlasts_a_loss_of_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is on the disk before it has its name, and its name before `put` ends."""
    media, kinds, sync = MediaStore.open(str(tmp_path)), [], os.fsync

    def noted(descriptor: int) -> None:
        kinds.append(stat.S_IFMT(os.fstat(descriptor).st_mode))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    await media.put("video_1/1/video.mp4", b"a video")
    assert kinds == [stat.S_IFREG, stat.S_IFDIR]
    await media.close()


async def test_nothing_blocks_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()

    def note(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            threads.add(threading.current_thread().name.rstrip("0123456789"))
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    media = MediaStore.open(str(tmp_path))
    note(os, "replace")
    for name in ("cat_file", "info", "modified", "open", "rm", "rm_file"):
        note(media._files, name)
    key = "video_1/1/video.mp4"
    await media.put(key, b"a video")
    await media.info(key)
    assert await media.get(key) == b"".join([piece async for piece in media.read(key)])
    await media.delete(key)
    await media.delete_tree("video_1")
    assert threads == {"omni-media_"}
    await media.close()
