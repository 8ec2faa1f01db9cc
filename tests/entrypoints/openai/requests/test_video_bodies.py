"""Bodies of `/v1/videos`: forms with bracketed keys, JSON, and input pictures in all forms that clients send."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from testbed.live_server import FAKE_VIDEO_INFO, FakeImageInput, LiveServer, live_server
from testbed.tiny_models import photo
from tests.entrypoints.openai.requests.test_uploads import png_header
from tests.entrypoints.openai.routes.test_image_edits import data_url, file_of
from tests.entrypoints.openai.routes.test_image_errors import error_of
from tests.entrypoints.openai.routes.videos import SYNC, VIDEOS, created, made
from vllm_omni.entrypoints.openai.schema.videos import REFERENCE_FIELDS
from vllm_omni.inputs.images import InputImage, prepare_image

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
PHOTO, OTHER = photo(64, 48, 1), photo(80, 60, 2)
URL = data_url(PHOTO)


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """A server whose model makes videos from one or two pictures."""
    with live_server(info=replace(FAKE_VIDEO_INFO, image_input=FakeImageInput(1, 2))) as running:
        yield running


@pytest.fixture(scope="module")
def text_server() -> Iterator[LiveServer]:
    """A server whose model makes videos from text alone."""
    with live_server(info=FAKE_VIDEO_INFO) as running:
        yield running


def seen(server: LiveServer) -> tuple[InputImage, ...]:
    """Pictures of the newest request on the device."""
    return list(server.device.images.values())[-1]


def prepared(*pictures: Any) -> tuple[InputImage, ...]:
    return tuple(prepare_image(picture, FakeImageInput().sizes) for picture in pictures)


def test_a_reference_by_the_sdk(server: LiveServer, sdk: openai.OpenAI) -> None:
    options: dict[str, Any]
    for options in (
        {"input_reference": file_of(PHOTO)},
        {"input_reference": ("a.png", file_of(PHOTO), "image/png")},
        {"extra_body": {"input_reference": {"image_url": URL}}},  # as an argument, this SDK takes files alone
    ):
        video = sdk.videos.create_and_poll(prompt="x", seconds="0.5", size="64x32", **options)
        assert (video.status, video.size, video.seconds) == ("completed", "64x32", "0.5")
        assert seen(server) == prepared(PHOTO), "the job has the pixels that were sent"
    remix = sdk.videos.poll(sdk.videos.remix(video.id, prompt="y").id)
    assert remix.status == "completed"
    assert seen(server) == prepared(PHOTO)


JSON_FORMS: list[Any] = [
    URL,
    {"image_url": URL},
    {"image_url": URL, "file_id": None},
    [URL],
    [{"image_url": URL}],
    json.dumps({"image_url": URL}),
    URL.partition(",")[2],
]


@pytest.mark.parametrize("name", REFERENCE_FIELDS)
@pytest.mark.parametrize("value", JSON_FORMS, ids=range(len(JSON_FORMS)))
def test_a_reference_in_json(server: LiveServer, http: httpx.Client, name: str, value: Any) -> None:
    made(http, **{name: value}, num_frames=5)
    assert seen(server) == prepared(PHOTO)


FORM_FORMS = ["input_reference", "input_reference[]", "input_reference[0]", "input_reference[image_url]"]
FORM_FORMS += ["input_reference[0][image_url]", "image_reference[image_url]", "reference_url", "image_reference"]


@pytest.mark.parametrize("name", FORM_FORMS)
def test_a_reference_as_text_of_a_form(server: LiveServer, http: httpx.Client, name: str) -> None:
    form = {"prompt": "x", name: URL, "num_frames": "5", "lora": "", "seed": "3"}
    response = http.post(SYNC, data=form, files={"none": ("", b"")})
    assert response.status_code == 200, response.text
    assert seen(server) == prepared(PHOTO)


def test_two_references_keep_their_order(server: LiveServer, http: httpx.Client) -> None:
    made(http, input_reference=[URL, {"image_url": data_url(OTHER)}])
    assert seen(server) == prepared(PHOTO, OTHER)
    files = [("input_reference[]", file_of(OTHER)), ("input_reference[]", file_of(PHOTO))]
    assert http.post(SYNC, data={"prompt": "x"}, files=files).status_code == 200
    assert seen(server) == prepared(OTHER, PHOTO)


BAD_REFERENCES: list[tuple[dict[str, Any], int, str]] = [
    ({"json": {}}, 400, "is required"),
    ({"data": {"input_reference": ""}, "files": {"none": ("", b"")}}, 400, "is required"),
    ({"json": {"input_reference": [URL] * 3}}, 400, "at most 2"),
    ({"json": {"input_reference": [URL] * 17}}, 400, "at most 16 entries"),
    ({"json": {"input_reference": URL, "reference_url": URL}}, 400, "names of the same"),
    ({"json": {"input_reference": "http://example.com/a.png"}}, 400, "this server fetches none from elsewhere"),
    ({"json": {"input_reference": {"image_url": "file:///etc/passwd"}}}, 400, "file"),
    ({"json": {"input_reference": "data:image/png;base64,AAAA"}}, 400, "(picture 1 of the request)"),
    ({"json": {"input_reference": {"file_id": "file-1"}}}, 400, "file_id"),
    ({"data": {"input_reference[file_id]": "file-1"}, "files": {"none": ("", b"")}}, 400, "file_id"),
    ({"data": {"input_reference[url]": URL}, "files": {"none": ("", b"")}}, 400, "image_url"),
    ({"files": {"input_reference": b""}}, 400, "(picture 1 of the request)"),
    ({"files": {"input_reference": b"no picture"}}, 400, "(picture 1 of the request)"),
    ({"files": {"input_reference": file_of(PHOTO)[:-40]}}, 400, "(picture 1 of the request)"),
    ({"files": {"input_reference": png_header(30_000, 30_000)}}, 400, "at most 33554432 pixels"),
    ({"files": {"input_reference": b"\0" * (50 * 2**20 + 1)}}, 413, "larger than"),
    ({"files": [("input_reference", file_of(PHOTO))] * 3}, 400, "at most 2"),
]


@pytest.mark.parametrize(("sent", "status", "words"), BAD_REFERENCES, ids=range(len(BAD_REFERENCES)))
def test_wrong_references_are_told(
    server: LiveServer, http: httpx.Client, sent: dict[str, Any], status: int, words: str
) -> None:
    num_before, num_jobs = len(server.device.images), len(http.get(VIDEOS, params={"limit": 100}).json()["data"])
    sent = {key: {"prompt": "x", **value} if key != "files" else value for key, value in sent.items()}
    if "files" in sent:
        sent.setdefault("data", {"prompt": "x"})
    response = http.post(VIDEOS, **sent)
    error = error_of(response)
    assert response.status_code == status, error
    assert words in error["message"], error
    assert (error["param"] or "input_reference") == "input_reference"
    assert len(server.device.images) == num_before
    assert len(http.get(VIDEOS, params={"limit": 100}).json()["data"]) == num_jobs
    budget = server.app.state.upload_budget
    server.wait_until(lambda: budget.num_bytes == 0)


@pytest.mark.parametrize("name", ["mask", "video_reference", "audio_reference", "control_reference", "source_video"])
def test_references_of_other_kinds_are_refused(http: httpx.Client, name: str) -> None:
    for sent in ({"json": {"prompt": "x", name: URL}}, {"data": {"prompt": "x"}, "files": {name: b"x"}}):
        response = http.post(VIDEOS, **sent)
        assert (response.status_code, error_of(response)["param"]) == (400, name)


def test_a_model_without_pictures_refuses_them(text_server: LiveServer) -> None:
    with httpx.Client(base_url=text_server.url) as client:
        for sent in (
            {"json": {"prompt": "x", "input_reference": URL}},
            {"data": {"prompt": "x"}, "files": {"input_reference": file_of(PHOTO)}},
            {"data": {"prompt": "x", "input_reference[image_url]": URL}, "files": {"none": ("", b"")}},
        ):
            response = client.post(VIDEOS, **sent)
            assert (response.status_code, error_of(response)["param"]) == (400, "input_reference")
            assert "takes no input image" in error_of(response)["message"]
        empty = {"prompt": "x", "input_reference": "", "reference_url": "", "seconds": "", "negative_prompt": ""}
        response = client.post(VIDEOS, data=empty, files={"none": ("", b"")})
        assert response.status_code == 200, response.text
        created(client, input_reference=None, reference_url="")


def test_a_form_has_the_fields_of_json(text_server: LiveServer) -> None:
    form = {
        "prompt": "x",
        "seconds": "0.5",
        "size": "32X32",
        "seed": "-1",
        "fps": "8",
        "priority": "-2",
        "cache": "false",
    }
    form |= {"partial_images": "1", "output_format": "WEBM", "foo[bar]": "1", "n": "1", "num_inference_steps": "3"}
    with httpx.Client(base_url=text_server.url) as client:
        video = client.post(VIDEOS, data=form, files={"none": ("", b"")}).json()
        assert (video["num_frames"], video["size"], video["output_format"]) == (5, "32x32", "webm")
        assert (video["num_inference_steps"], video["ignored_fields"]) == (3, ["foo"])
        for field, value in (("seconds", "abc"), ("seconds", "-1"), ("n", "2"), ("fps", "x"), ("cache", "maybe")):
            response = client.post(VIDEOS, data={"prompt": "x", field: value}, files={"none": ("", b"")})
            assert (response.status_code, error_of(response)["param"]) == (400, field)
