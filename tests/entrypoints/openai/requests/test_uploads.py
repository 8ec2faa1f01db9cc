"""Uploads that are wrong, broken, too large or incomplete: error objects, bounded memory, no effect on others."""

from __future__ import annotations

import base64
import json
import resource
import select
import socket
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from testbed.live_server import (
    FAKE_EDIT_INFO,
    FAKE_INFO,
    LiveServer,
    expected_picture,
    live_server,
)
from testbed.tiny_models import photo
from tests.entrypoints.openai.requests.pictures.decoders import num_threads
from tests.entrypoints.openai.routes.test_image_edits import EDITS, data_url, file_of, pixels
from tests.entrypoints.openai.routes.test_image_errors import error_of
from vllm_omni.entrypoints.openai.requests.body_reader import MAX_JSON_BYTES
from vllm_omni.entrypoints.openai.requests.input_pictures import MAX_IMAGE_BYTES

PHOTO = photo(64, 48, 1)
PNG, JPEG, WEBP = (file_of(PHOTO, kind) for kind in ("PNG", "JPEG", "WEBP"))


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(info=FAKE_EDIT_INFO) as running:
        yield running


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and contains almost no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")


BAD_FILES = {
    "empty": b"",
    "text": b"this is no picture",
    "gif": file_of(PHOTO, "GIF"),
    "bmp": file_of(PHOTO, "BMP"),
    "tiff": file_of(PHOTO, "TIFF"),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "large": png_header(10_000, 10_000),
    "huge": png_header(2**31 - 1, 2**31 - 1),
    "16 bit": file_of(Image.new("I;16", (9, 9)), "PNG"),
    "cut png": PNG[:-200],
    "cut jpeg": JPEG[:-200],
    "cut webp": WEBP[:-20],
    "less than it claims": png_header(300, 300),
    "broken png": PNG[:60] + b"\xff" * 40 + PNG[100:],
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_a_400_that_names_the_image(server: LiveServer, http: httpx.Client, name: str) -> None:
    num_before = len(server.device.prompts)
    response = http.post(EDITS, files={"image": ("photo.png", BAD_FILES[name], "image/png")}, data={"prompt": "x"})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert (error["type"], error["param"]) == ("invalid_request_error", "image")
    assert response.headers["x-should-retry"] == "false"
    assert len(server.device.prompts) == num_before


def test_too_many_pictures(http: httpx.Client) -> None:
    response = http.post(EDITS, files=[("image[]", PNG)] * 4, data={"prompt": "x"})
    assert (response.status_code, error_of(response)["param"]) == (400, "image")
    assert "at most 3 pictures on this model" in response.json()["error"]["message"]
    images = [{"image_url": data_url(PHOTO)}] * 4
    response = http.post(EDITS, json={"prompt": "x", "images": images})
    assert (response.status_code, error_of(response)["param"]) == (400, "image")


@pytest.mark.parametrize("name", ["mask", "markup"])
def test_masks_are_refused_by_name(http: httpx.Client, name: str) -> None:
    response = http.post(EDITS, files={"image": PNG, name: PNG}, data={"prompt": "x"})
    assert (response.status_code, error_of(response)["param"]) == (400, name)
    body = {"prompt": "x", "images": [{"image_url": data_url(PHOTO)}], name: {"image_url": data_url(PHOTO)}}
    response = http.post(EDITS, json=body)
    assert (response.status_code, error_of(response)["param"]) == (400, name)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "word " * 600}, "prompt"),
        ({"prompt": "x", "n": "two"}, "n"),
        ({"prompt": "x", "n": "11"}, "n"),
        ({"prompt": "x", "stream": "maybe"}, "stream"),
        ({"prompt": "x", "size": "65x64"}, "size"),
        ({"prompt": "x", "true_cfg_scale": "nan"}, "true_cfg_scale"),
        ({"prompt": "x", "lora[name]": "style"}, "lora"),
        ({"prompt": "x", "model": "gpt-9"}, "model"),
        ({"prompt": b"\xff\xfe"}, "prompt"),
    ],
)
def test_bad_fields_of_a_form(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    response = http.post(EDITS, files={"image": PNG}, data=fields)
    assert response.status_code == (404 if param == "model" else 400), response.text
    assert error_of(response)["param"] == param


def test_an_edit_needs_a_picture(http: httpx.Client) -> None:
    for request in ({"files": {"prompt": (None, "x")}}, {"json": {"prompt": "x"}}):
        response = http.post(EDITS, **request)
        assert (response.status_code, error_of(response)["param"]) == (400, "image")
        message = error_of(response)["message"]
        assert '"images": [{"image_url": "data:image/png;base64,..."}] in JSON' in message
        assert "/v1/" not in message, "this model takes nothing elsewhere"
        assert "multi_modal_data" not in message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"images": [{"file_id": "file-1"}]}, "images.0.file_id"),
        ({"images": []}, "images"),
        ({"images": [{}]}, "images.0"),
        ({"images": data_url(PHOTO)}, "images"),
        ({"image": []}, "image"),
        ({"image": 3}, "image"),
        ({"image": [3]}, "image.0"),
        ({"image": ""}, "image"),
        ({"image": "file:///etc/passwd"}, "image_url"),
        ({"image": ["data:image/png;base64,aGVsbG8="]}, "image"),
        ({"image": [data_url(PHOTO)] * 4}, "image"),
        ({"image": data_url(PHOTO), "images": [{"image_url": data_url(PHOTO)}]}, "image"),
    ],
)
def test_wrong_pictures_in_json(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    response = http.post(EDITS, json={"prompt": "x", **fields})
    assert (response.status_code, error_of(response)["param"]) == (400, param), response.text


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://example.com/a.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "data:image/png,plain",
        "data:image/png;base64,@@@",
        "data:image/png;base64,ü",
        "data:",
        "",
    ],
)
def test_urls_that_are_no_data_are_refused_and_not_fetched(http: httpx.Client, url: str) -> None:
    response = http.post(EDITS, json={"prompt": "x", "images": [{"image_url": url}]})
    assert (response.status_code, error_of(response)["param"]) == (400, "image_url")


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"", "multipart/form-data"),
        (b"", "multipart/form-data; boundary=x"),
        (b"nothing", "multipart/form-data; boundary=x"),
        (b"--x\r\n", "multipart/form-data; boundary=" + "x" * 999),
        (b'--x\r\ncontent-disposition: form-data; name="image"\r\n\r\n' + PNG, "multipart/form-data; boundary=x"),
        (b"--x\r\n" + b"a: b\r\n" * 999 + b"\r\n", "multipart/form-data; boundary=x"),
        (b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\nb\r\n' * 200, "multipart/form-data; boundary=x"),
        (b"--x\r\n\r\nno name\r\n--x--\r\n", "multipart/form-data; boundary=x"),
        (b'{"prompt": ', "application/json"),
        (b"[" * 100_000, "application/json"),
        (b"null", "application/json"),
        (b"\xff", "application/json"),
        (b"{}", "text/plain"),
        (b"prompt=x", "application/x-www-form-urlencoded"),
    ],
)
def test_bodies_that_are_neither_form_nor_json(http: httpx.Client, content: bytes, content_type: str) -> None:
    response = http.post(EDITS, content=content, headers={"content-type": content_type})
    assert response.status_code == 400, response.text
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("missing", [b"--\r\n", b"\r\n--x--\r\n"], ids=["end of the last boundary", "last boundary"])
def test_a_form_that_ends_early_makes_no_picture(server: LiveServer, http: httpx.Client, missing: bytes) -> None:
    """The content-length equals the bytes sent: the client's file was cut before it was sent."""
    head = b'content-disposition: form-data; name="%s"%s\r\n\r\n'
    whole = b"--x\r\n" + head % (b"image", b'; filename="a.png"') + PNG
    whole += b"\r\n--x\r\n" + head % (b"prompt", b"") + b"a panda\r\n--x--\r\n"
    headers, num_before = {"content-type": "multipart/form-data; boundary=x"}, len(server.device.prompts)
    response = http.post(EDITS, content=whole.removesuffix(missing), headers=headers)
    assert response.status_code == 400, response.text
    assert error_of(response)["message"] == "the request's multipart/form-data ends in the middle"
    assert len(server.device.prompts) == num_before
    assert http.post(EDITS, content=whole, headers=headers).status_code == 200


def form(parts: Iterator[bytes], name: str = "image") -> Iterator[bytes]:
    head = f'--x\r\ncontent-disposition: form-data; name="{name}"; filename="a.png"\r\n\r\n'
    yield head.encode()
    yield from parts
    yield b"\r\n--x--\r\n"


@pytest.mark.parametrize(
    ("name", "most"), [("image", MAX_IMAGE_BYTES), ("prompt", 128_000), (None, MAX_JSON_BYTES)], ids=str
)
def test_what_is_too_large_is_counted_while_it_streams(
    server: LiveServer, http: httpx.Client, name: str | None, most: int
) -> None:
    """No more than the limit is kept; the rest is read and dropped, so that the client hears why."""
    budget, most_held = server.app.state.upload_budget, 0

    def endless() -> Iterator[bytes]:
        nonlocal most_held
        for _ in range(4 * most // 2**16):
            most_held = max(most_held, budget.num_bytes)
            yield bytes(2**16)

    headers = {"content-type": "application/json" if name is None else "multipart/form-data; boundary=x"}
    content = endless() if name is None else form(endless(), name)
    response = http.post(EDITS, content=content, headers=headers)
    assert response.status_code == 413, response.text
    assert error_of(response)["type"] == "invalid_request_error"
    assert most_held <= most + 2**20


def test_memory_is_given_back_and_a_full_server_says_so(server: LiveServer, http: httpx.Client) -> None:
    budget = server.app.state.upload_budget
    assert budget.num_bytes == 0
    most, budget.max_bytes = budget.max_bytes, 100_000
    try:
        response = http.post(EDITS, files={"image": bytes(200_000)}, data={"prompt": "x"})
    finally:
        budget.max_bytes = most
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert budget.num_bytes == 0


def test_pixels_count_while_the_rest_of_an_upload_is_awaited(server: LiveServer) -> None:
    """A small file can contain a large picture, even if the client sends nothing more."""
    budget = server.app.state.upload_budget
    flat = file_of(Image.new("RGB", (1000, 800)), "PNG")
    assert len(flat) < 10_000
    held = 0

    def parts() -> Iterator[bytes]:
        nonlocal held
        for _ in range(2):
            yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + flat + b"\r\n"
        yield b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx'
        server.wait_until(lambda: budget.num_bytes >= 2 * 1000 * 800 * 3)
        held = budget.num_bytes
        yield b"\r\n--x--\r\n"

    with httpx.Client(base_url=server.url) as http:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        assert http.post(EDITS, content=parts(), headers=headers).status_code == 200
        assert held < 2 * 1000 * 800 * 3 + 2**16
        assert budget.num_bytes == 0
        most, budget.max_bytes = budget.max_bytes, 2**20
        try:
            urls = [{"image_url": data_url(Image.new("RGB", (1000, 800)))}]
            for body in (
                {"files": {"image": flat}, "data": {"prompt": "x"}},
                {"json": {"prompt": "x", "images": urls}},
            ):
                assert http.post(EDITS, **body).status_code == 429
        finally:
            budget.max_bytes = most
    assert budget.num_bytes == 0


@pytest.mark.parametrize("stream", [False, True])
def test_pixels_count_until_the_request_has_ended(server: LiveServer, stream: bool) -> None:
    """A queued request holds the pixels and not the file; so does a stream, whose response begins before it runs."""
    budget, num_pixel_bytes = server.app.state.upload_budget, 400 * 300 * 3
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    request = {
        "files": {"image": file_of(Image.fromarray(noise), "PNG")},
        "data": {"prompt": "x", "size": "64x64", "stream": str(stream).lower()},
    }
    most, budget.max_bytes = budget.max_bytes, num_pixel_bytes * 3 // 2
    server.call(server.device.pause)
    try:
        with httpx.Client(base_url=server.url) as http, ThreadPoolExecutor(1) as pool:
            answer = pool.submit(http.post, EDITS, **request)  # type: ignore[arg-type]
            server.wait_until(lambda: server.num_unfinished() == 1)
            try:
                held, refused = budget.num_bytes, http.post(EDITS, **request)  # type: ignore[arg-type]
            finally:
                server.call(server.device.resume)
            assert answer.result().status_code == 200
            server.wait_until(lambda: budget.num_bytes == 0)
    finally:
        budget.max_bytes = most
    (image,) = list(server.device.images.values())[-1]
    assert num_pixel_bytes <= image.num_bytes <= held < image.num_bytes + 2**12
    assert refused.status_code == 429
    assert "leave no room" in error_of(refused)["message"]


def test_bad_uploads_leave_neighbours_and_memory_alone(server: LiveServer) -> None:
    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    bad = [*BAD_FILES.values(), *(png_header(2**15, 2**15) for _ in range(10))] * 2
    before = peak()
    with (
        httpx.Client(base_url=server.url) as http,
        openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        good = [
            pool.submit(client.images.edit, image=PNG, prompt="x", size="64x64", extra_body={"seed": seed})
            for seed in range(12)
        ]
        refused = [pool.submit(http.post, EDITS, files={"image": file}, data={"prompt": "x"}) for file in bad]
        assert {answer.result().status_code for answer in refused} == {400}
        for seed, answer in enumerate(good):
            data = answer.result().data
            assert data is not None
            np.testing.assert_array_equal(pixels(data[0].b64_json), expected_picture(seed))
    assert server.app.state.upload_budget.num_bytes == 0
    assert peak() - before < 200 * 2**20, "a header that claims gigabytes must cost nothing"


def test_a_client_that_leaves_in_the_middle_of_its_upload(server: LiveServer) -> None:
    def broken() -> Iterator[bytes]:
        yield bytes(2**16)
        raise ConnectionError("the client is gone")

    with httpx.Client(base_url=server.url) as http, pytest.raises(ConnectionError):
        http.post(EDITS, content=form(broken()), headers={"content-type": "multipart/form-data; boundary=x"})
    server.wait_until(lambda: server.app.state.upload_budget.num_bytes == 0)
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        (EDITS, "multipart/form-data; boundary=x"),
        (EDITS, "application/json"),
        ("/v1/chat/completions", "application/json"),
        ("/v1/images/generations", "application/json"),
    ],
)
def test_a_body_that_stands_still_is_ended(path: str, content_type: str) -> None:
    """A connected client that sends nothing: its upload so far must not stay in memory."""
    info = FAKE_EDIT_INFO if path == EDITS else FAKE_INFO
    with live_server(info=info, settings={"upload_silence_seconds": 0.2}) as server:
        connection = HTTPConnection(server.url.removeprefix("http://"))
        connection.putrequest("POST", path)
        for name, value in (("content-type", content_type), ("content-length", "1000000")):
            connection.putheader(name, value)
        connection.endheaders(next(form(iter(()))) + PNG[:100])
        budget = server.app.state.upload_budget
        response = connection.getresponse()
        error = json.loads(response.read())["error"]
        assert (response.status, error["type"], error["code"]) == (408, "invalid_request_error", "request_timeout")
        assert "for 0.2 seconds, or than 65536 for 2" in error["message"]
        assert response.getheader("connection") == "close"
        assert budget.num_bytes == 0
        connection.close()


def test_an_upload_that_trickles_is_ended() -> None:
    """A client that is never silent for long and never finishes."""
    with live_server(info=FAKE_EDIT_INFO, settings={"upload_silence_seconds": 0.5}) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            head = (
                f"POST {EDITS} HTTP/1.1",
                "host: x",
                "content-type: application/json",
                "content-length: 1000000",
                "",
            )
            client.sendall("\r\n".join((*head, "")).encode())
            for _ in range(400):
                client.sendall(b" ")
                if select.select([client], [], [], 0.05)[0]:
                    break
            else:
                pytest.fail("nobody minds")
            assert client.recv(100).startswith(b"HTTP/1.1 408 ")
        server.wait_until(lambda: server.app.state.upload_budget.num_bytes == 0)


def test_processes_are_there_for_models_that_take_pictures_alone(server: LiveServer) -> None:
    assert num_threads(server.app.state.decode_pool) > 0
    with live_server(info=FAKE_INFO) as other:
        assert num_threads(other.app.state.decode_pool) == 0


def test_an_error_says_which_picture_is_wrong(http: httpx.Client) -> None:
    bad = data_url(PHOTO)[:-400]
    response = http.post(EDITS, files=[("image[]", PNG), ("image[]", PNG[:-200])], data={"prompt": "x"})
    assert error_of(response)["message"] == "image is a broken PNG file (picture 2 of the request)"
    response = http.post(EDITS, json={"prompt": "x", "image": [data_url(PHOTO), data_url(PHOTO), bad]})
    assert error_of(response)["message"] == "image is a broken PNG file (picture 3 of the request)"


def test_base64_is_read_in_pieces(server: LiveServer, http: httpx.Client) -> None:
    """A picture whose URL is longer than one piece."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8))
    url = "data:image/png;base64," + base64.b64encode(file_of(noise)).decode()
    assert len(url) > 2**20
    response = http.post(EDITS, json={"prompt": "x", "images": [{"image_url": url}]})
    assert response.status_code == 200, response.text
    (image,) = list(server.device.images.values())[-1]
    np.testing.assert_array_equal(image.condition, np.asarray(noise))
    assert json.loads(response.content)["usage"]["input_tokens_details"]["image_tokens"] == 6
