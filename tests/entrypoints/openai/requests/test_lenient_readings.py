"""Lenient readings of clients' spellings, the same in JSON, forms and chats."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from testbed.live_server import FAKE_EDIT_INFO, MODEL_NAME, LiveServer, expected_picture, live_server
from tests.entrypoints.openai.routes.test_chat_completions import CHAT, PHOTO, says, text
from tests.entrypoints.openai.routes.test_image_edits import EDITS, data_url, file_of, newest, pixels
from tests.entrypoints.openai.routes.test_image_errors import GENERATIONS, error_of
from vllm_omni.entrypoints.openai.schema.images import ImageEditRequest

ROUTES = ("generations", "json edits", "form edits", "chat", "extra_body")
OPTIONAL = sorted(set(ImageEditRequest.model_fields) - {"prompt", "negative_prompt", "image", "images"})


@pytest.fixture(scope="module")
def editor() -> Iterator[LiveServer]:
    with live_server(info=FAKE_EDIT_INFO) as running:
        yield running


@pytest.fixture(params=ROUTES)
def send(request: pytest.FixtureRequest, server: LiveServer, editor: LiveServer) -> Any:
    """A function that sends fields by one of the routes and returns the response."""
    content = [text("x"), {"type": "image_url", "image_url": {"url": data_url(PHOTO)}}]

    def post(**fields: Any) -> httpx.Response:
        match request.param:
            case "generations":
                return httpx.post(server.url + GENERATIONS, json={"prompt": "x", **fields})
            case "json edits":
                body = {"prompt": "x", "image": data_url(PHOTO), **fields}
                return httpx.post(editor.url + EDITS, json=body)
            case "form edits":
                sent = {name: str(value) for name, value in fields.items() if value is not None}
                form = {"prompt": "x", **sent}
                return httpx.post(editor.url + EDITS, files={"image": file_of(PHOTO)}, data=form)
            case "chat":
                return httpx.post(editor.url + CHAT, json={"messages": [says(content)], **fields})
            case _:
                body = {"messages": [says(content)], "extra_body": fields}
                return httpx.post(editor.url + CHAT, json=body)

    return post


def pictures(response: httpx.Response) -> list[tuple[np.ndarray, int]]:
    """(pixels, seed) of an answer of any route."""
    assert response.status_code == 200, response.text
    answer = response.json()
    if "data" in answer:
        return [(pixels(item["b64_json"]), item["seed"]) for item in answer["data"]]
    urls = [(choice["message"]["images"][0]["image_url"]["url"], choice["seed"]) for choice in answer["choices"]]
    return [(pixels(url.partition(",")[2]), seed) for url, seed in urls]


@pytest.mark.parametrize("size", ["96X64", "96\u00d764", "96*64", "96 x 64", " 96x64 "])
def test_sizes(send: Any, size: str) -> None:
    ((picture, _),) = pictures(send(size=size, seed=3))
    np.testing.assert_array_equal(picture, expected_picture(3, height=64, width=96))


def test_words_in_any_case_and_jpg(send: Any) -> None:
    response = send(output_format="JPG", quality="High", background="AUTO", size="AUTO", style="Vivid")
    assert response.status_code == 200, response.text
    if "data" in response.json():
        assert (response.json()["output_format"], response.json()["quality"]) == ("jpeg", "high")
    else:
        url = response.json()["choices"][0]["message"]["images"][0]["image_url"]["url"]
        assert url.startswith("data:image/jpeg;base64,")
    assert response.json()["ignored_fields"] == []


def test_seed_of_minus_one_is_random(send: Any) -> None:
    seeds = [seed for _ in range(2) for _, seed in pictures(send(seed=-1, n=2))]
    assert min(seeds) >= 0
    assert (seeds[1], seeds[3]) == (seeds[0] + 1, seeds[2] + 1)
    assert seeds[0] != seeds[2]


def test_a_random_seed_goes_before_the_servers_default() -> None:
    with live_server(default_sampling_params={"seed": 5}) as running:
        url = running.url + GENERATIONS
        seeds = [httpx.post(url, json={"prompt": "x", "seed": seed}).json()["data"][0]["seed"] for seed in (None, -1)]
    assert seeds[0] == 5
    assert seeds[1] != 5


@pytest.mark.parametrize("value", ["", None], ids=["empty", "null"])
def test_empty_is_absent(send: Any, value: str | None) -> None:
    response = send(**dict.fromkeys([*OPTIONAL, "unknown"], value))
    assert response.status_code == 200, response.text
    assert len(pictures(response)) == 1
    assert response.json()["ignored_fields"] == []


def test_an_empty_negative_prompt_says_something(send: Any) -> None:
    assert send(negative_prompt="", true_cfg_scale=4).json()["ignored_fields"] == []
    assert send(negative_prompt="").json()["ignored_fields"] == ["negative_prompt"]
    assert send(true_cfg_scale=4).json()["ignored_fields"] == ["true_cfg_scale"]


def test_an_empty_prompt_is_an_error(server: LiveServer, editor: LiveServer) -> None:
    responses = [
        httpx.post(server.url + GENERATIONS, json={"prompt": ""}),
        httpx.post(editor.url + EDITS, json={"prompt": "", "image": data_url(PHOTO)}),
        httpx.post(editor.url + EDITS, files={"image": file_of(PHOTO)}, data={"prompt": ""}),
    ]
    assert [(response.status_code, error_of(response)["param"]) for response in responses] == [(400, "prompt")] * 3
    assert httpx.post(server.url + CHAT, json={"messages": ""}).status_code == 400
    assert httpx.post(server.url + CHAT, json={"messages": [says("")]}).status_code == 400


def test_the_shift_has_two_names(send: Any) -> None:
    assert send(shift=3, flow_shift=3.0).json()["ignored_fields"] == []
    differ = error_of(send(shift=3.0, flow_shift=5.0))
    assert differ["message"] == "shift and flow_shift differ: got 3.0 and 5.0"
    wide = error_of(send(shift=1000))
    assert wide["param"] == "flow_shift"
    assert wide["message"].endswith("flow_shift takes a number from 0.01 to 100, got 1000.0")


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("size", "96/64", "auto or WIDTHxHEIGHT"),
        ("size", "96x64x3", "auto or WIDTHxHEIGHT"),
        ("seed", -2, "greater than or equal to -1"),
        ("output_format", "gif", "'png', 'jpeg' or 'webp'"),
        ("background", "red", "'auto', 'opaque' or 'transparent'"),
        ("quality", "best", "'standard' or 'hd'"),
    ],
)
def test_an_error_names_what_is_accepted(send: Any, field: str, value: Any, accepted: str) -> None:
    error = error_of(send(**{field: value}))
    assert error["param"] == field
    assert accepted in error["message"]
    assert str(value) in error["message"]


@pytest.mark.parametrize("where", ["image", "images", "image list", "form", "chat"])
def test_base64_without_a_data_url(editor: LiveServer, where: str) -> None:
    data = base64.b64encode(file_of(PHOTO)).decode()
    part = {"type": "image_url", "image_url": {"url": data}}
    response = {
        "image": lambda: httpx.post(editor.url + EDITS, json={"prompt": "x", "image": data}),
        "images": lambda: httpx.post(editor.url + EDITS, json={"prompt": "x", "images": [{"image_url": data}]}),
        "image list": lambda: httpx.post(editor.url + EDITS, json={"prompt": "x", "image": [data]}),
        "form": lambda: httpx.post(editor.url + EDITS, files={"image": (None, data), "prompt": (None, "x")}),
        "chat": lambda: httpx.post(editor.url + CHAT, json={"messages": [says([text("x"), part])]}),
    }[where]()
    assert response.status_code == 200, response.text
    (image,) = newest(editor)
    np.testing.assert_array_equal(image.condition, np.asarray(PHOTO))
    assert editor.app.state.upload_budget.num_bytes == 0


def test_fields_of_a_form_that_hold_pictures(editor: LiveServer) -> None:
    """A part without a file name has a `data:` URL as in JSON, or the bytes of a file."""
    for value in (data_url(PHOTO), file_of(PHOTO)):
        response = httpx.post(editor.url + EDITS, files={"image": (None, value), "prompt": (None, "x")})
        assert response.status_code == 200, response.text
        np.testing.assert_array_equal(newest(editor)[0].condition, np.asarray(PHOTO))
    empty = httpx.post(editor.url + EDITS, files={"image": (None, ""), "prompt": (None, "x")})
    assert error_of(empty)["message"].startswith("image is required")
    broken = httpx.post(editor.url + EDITS, files={"image": (None, "A" * 100_001), "prompt": (None, "x")})
    assert error_of(broken)["param"] == "image_url"
    assert editor.app.state.upload_budget.num_bytes == 0


def test_text_of_a_picture_is_not_held_longer_than_a_file() -> None:
    """While a request runs, only the pixels that the model reads count against the upload budget."""
    held = []
    with live_server(info=FAKE_EDIT_INFO) as running:
        budget = running.app.state.upload_budget
        running.call(running.device.pause)
        for value in (("a.png", file_of(PHOTO)), (None, data_url(PHOTO))):
            form: Any = {"image": value, "prompt": (None, "x"), "stream": (None, "true")}
            with httpx.stream("POST", running.url + EDITS, files=form):
                held.append(budget.num_bytes)
            running.wait_until(lambda: budget.num_bytes == 0)
        running.call(running.device.resume)
    assert held[0] > 0
    assert abs(held[1] - held[0]) < 100 < len(file_of(PHOTO)), "what differs are the headers of the parts"


def test_files_that_were_not_chosen_in_a_browser_are_absent(editor: LiveServer) -> None:
    part = 'content-disposition: form-data; name="{}"; filename="{}"\r\n\r\n'
    chosen = part.format("image", "a.png").encode() + file_of(PHOTO)
    parts = [part.format("mask", "").encode(), part.format("image[]", "").encode(), chosen]
    fields = b'content-disposition: form-data; name="prompt"\r\n\r\nx'
    body = b"".join(b"--x\r\n" + part + b"\r\n" for part in [*parts, fields]) + b"--x--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=x"}
    response = httpx.post(editor.url + EDITS, content=body, headers=headers)
    assert response.status_code == 200, response.text
    assert len(newest(editor)) == 1


@pytest.mark.parametrize("name", ["mask", "mask[image_url]", "markup"])
def test_a_mask_as_a_text_field_is_refused_by_name(editor: LiveServer, name: str) -> None:
    response = httpx.post(editor.url + EDITS, files={"image": file_of(PHOTO)}, data={"prompt": "x", name: "y"})
    assert (response.status_code, error_of(response)["param"]) == (400, name.partition("[")[0])


@pytest.mark.parametrize("name", ["file", "picture", "images", "image[a]"])
def test_a_file_under_another_name(editor: LiveServer, name: str) -> None:
    response = httpx.post(editor.url + EDITS, files={name: file_of(PHOTO)}, data={"prompt": "x"})
    assert response.status_code == 400
    assert error_of(response)["message"] == f"files go in image or image[], got one in {name!r}"
    assert error_of(response)["param"] == name


def test_a_file_without_a_name(editor: LiveServer) -> None:
    response = httpx.post(editor.url + EDITS, files={"": file_of(PHOTO)}, data={"prompt": "x"})
    assert error_of(response)["message"] == "files go in image or image[], got one without a name"
    assert error_of(response)["param"] is None


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "user", "lora"])
def test_a_picture_in_a_text_field(editor: LiveServer, name: str) -> None:
    files = [("image", file_of(PHOTO)), (name, file_of(PHOTO))]
    response = httpx.post(editor.url + EDITS, files=files, data={} if name == "prompt" else {"prompt": "x"})
    assert (response.status_code, error_of(response)["param"]) == (400, name)
    wanted = f"{name} takes text in UTF-8, got a file that is none: pictures go in image or image[]"
    assert error_of(response)["message"] == wanted


def test_a_text_field_may_come_as_a_file(editor: LiveServer) -> None:
    """A prompt as a file, as `curl -F prompt=@prompt.txt` sends it."""
    files: dict[str, Any] = {"image": file_of(PHOTO), "prompt": ("prompt.txt", b"from a file")}
    assert httpx.post(editor.url + EDITS, files=files).status_code == 200
    assert list(editor.device.prompts.values())[-1] == "from a file"


def test_trailing_slashes(server: LiveServer, editor: LiveServer) -> None:
    with httpx.Client(base_url=server.url) as client:
        for path in ("/health", "/ping", "/load", "/version", "/metrics", "/v1/models", f"/v1/models/{MODEL_NAME}"):
            assert client.get(path + "/").status_code == 200, path
        assert client.get("/v1/models/").json() == client.get("/v1/models").json()
        assert client.post(GENERATIONS + "/", json={"prompt": "x"}).status_code == 200
        assert client.post(CHAT + "/", json={"messages": [says("x")]}).status_code == 200
        assert client.get("/").status_code == 404
        assert error_of(client.post("/v1/completions/", json={}))["type"] == "invalid_request_error"
    large = file_of(PHOTO.resize((900, 900)), "PNG", compress_level=0)
    assert len(large) > 2**21, "beyond the limit of other routes' bodies"
    response = httpx.post(editor.url + EDITS + "/", files={"image": large}, data={"prompt": "x"})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("default", ["b64_json", "url"])
def test_the_default_response_format(default: str) -> None:
    with live_server(settings={"default_response_format": default}) as running:
        url = running.url + GENERATIONS
        for sent in (None, "", "URL", "b64_json"):
            (item,) = httpx.post(url, json={"prompt": "x", "response_format": sent}).json()["data"]
            expected = sent.lower() if sent else default
            assert set(item) == {expected, "seed"}
        streamed = httpx.post(url, json={"prompt": "x", "stream": True})
        assert '"b64_json":"' in streamed.text
        assert httpx.post(url, json={"prompt": "x", "stream": True, "response_format": "url"}).status_code == 400
