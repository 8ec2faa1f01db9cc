"""/docs and /openapi.json: complete without the web, with examples that run unchanged."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest

from testbed.live_server import FAKE_EDIT_INFO, FAKE_INFO, FAKE_VIDEO_INFO, FakeImageInput, LiveServer, live_server
from tests.entrypoints.openai.routes.test_image_edits import PHOTO, file_of
from tests.entrypoints.openai.routes.test_image_errors import error_of
from tests.entrypoints.openai.routes.videos import SYNC, VIDEOS, ended
from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.entrypoints.vllm_api import swagger_ui_folder


class Links(HTMLParser):
    """Addresses that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]


@pytest.mark.parametrize("root_path", ["", "/omni"])
def test_the_page_loads_nothing_from_elsewhere(root_path: str) -> None:
    settings = {"swagger_ui_folder": swagger_ui_folder(), "root_path": root_path}
    with live_server(settings=settings) as running, httpx.Client(base_url=running.url) as client:
        for path in (f"{root_path}/docs", f"{root_path}/docs/", "/docs"):
            page = client.get(path)
            assert page.status_code == 200
            assert page.headers["content-type"].startswith("text/html")
            assert re.findall(r"https?://", page.text) == []
            assert '"validatorUrl": null' in page.text
            links = Links()
            links.feed(page.text)
            files = [address for address in links.addresses if address != "data:,"]
            assert len(files) == 2
            assert all(address.startswith(f"{root_path}/docs/") for address in files)
            for address in files:
                file = client.get(urljoin(path, address))
                assert file.status_code == 200
                assert len(file.content) > 100_000
                assert file.headers["content-type"].split(";")[0] in ("text/css", "text/javascript")
            (schema_path,) = re.findall(r"url: '(.*)'", page.text)
            assert schema_path == f"{root_path}/openapi.json"
            schema = client.get(schema_path).json()
            assert schema.get("servers", [{"url": ""}]) == [{"url": root_path}]


def test_files_beside_those_of_the_page_are_not_served(tmp_path: Path) -> None:
    (tmp_path / "secret.js").write_text("secret")
    with live_server(settings={"swagger_ui_folder": tmp_path}) as running:
        for path in ("/docs/secret.js", "/docs/..%2Fsecret.js", "/docs/swagger-ui.css", "/docs"):
            response = httpx.get(running.url + path)
            assert response.status_code == 404
            assert error_of(response)["type"] == "invalid_request_error"


def test_a_page_without_its_files_says_so(http: httpx.Client) -> None:
    response = http.get("/docs")
    assert response.status_code == 404
    assert "/openapi.json" in error_of(response)["message"]
    assert http.get("/openapi.json").status_code == 200
    assert http.get("/redoc").status_code == 404, "its script is not in vLLM's package"


def test_docs_can_be_disabled() -> None:
    with live_server(settings={"disable_docs": True, "swagger_ui_folder": swagger_ui_folder()}) as running:
        for path in ("/docs", "/docs/swagger-ui.css", "/redoc", "/openapi.json"):
            assert httpx.get(running.url + path).status_code == 404


def operations(schema: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (method, path, operation) for path, methods in schema["paths"].items() for method, operation in methods.items()
    ]


@pytest.mark.parametrize("info", [FAKE_INFO, FAKE_EDIT_INFO], ids=["text to image", "edits"])
def test_every_example_runs_as_it_is(info: ModelInfo) -> None:
    with live_server(info=info) as running, httpx.Client(base_url=running.url) as client:
        sent = []
        for method, path, operation in operations(client.get("/openapi.json").json()):
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                if kind == "application/json":
                    response = client.request(method, path, json=content["example"])
                else:
                    form = {name: str(value) for name, value in content["example"].items()}
                    response = client.request(method, path, data=form, files={"image": file_of(PHOTO)})
                assert response.status_code == 200, response.text
                assert response.json()["ignored_fields"] == []
                sent.append((path, kind))
    edits = [("/v1/images/edits", "application/json"), ("/v1/images/edits", "multipart/form-data")]
    images = [("/v1/images/generations", "application/json")] if info is FAKE_INFO else edits
    assert sent == [*images, ("/v1/chat/completions", "application/json")]


@pytest.mark.parametrize("image_input", [None, FakeImageInput()], ids=["from text", "from pictures"])
def test_every_example_of_videos_runs_as_it_is(image_input: FakeImageInput | None) -> None:
    sent = []
    with (
        live_server(info=replace(FAKE_VIDEO_INFO, image_input=image_input)) as running,
        httpx.Client(base_url=running.url) as client,
    ):
        reference = {} if image_input is None else {"input_reference": file_of(PHOTO)}
        source = ended(
            client, client.post(VIDEOS, data={"prompt": "x"}, files={**reference, "prompt": b"x"}).json()["id"]
        )
        for method, path, operation in operations(client.get("/openapi.json").json()):
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                arguments: dict[str, Any] = {"json": content["example"]}
                if kind != "application/json":
                    form = {name: str(value) for name, value in content["example"].items()}
                    arguments = {"data": form, "files": reference or {"none": ("", b"")}}
                response = client.request(method, path.format(video_id=source["id"]), **arguments)
                assert response.status_code == 200, response.text
                assert "x-omni-ignored-fields" not in response.headers
                sent.append((path, kind))
    kinds = ("application/json", "multipart/form-data")
    paths = [(path, kind) for path in (VIDEOS, SYNC) for kind in kinds]
    pictures = [("/v1/images/generations", "application/json")] if image_input is None else []
    chat, remix = ("/v1/chat/completions", "application/json"), (f"{VIDEOS}/{{video_id}}/remix", "application/json")
    assert sent == [*pictures, chat, *paths, remix]


@pytest.mark.parametrize(
    ("info", "path", "pictures"),
    [(FAKE_EDIT_INFO, "/v1/images/edits", "image"), (FAKE_VIDEO_INFO, VIDEOS, "input_reference")],
    ids=["edits", "videos"],
)
def test_a_form_is_filled_with_its_example(info: ModelInfo, path: str, pictures: str) -> None:
    """Swagger UI fills its form with each property's example, or with a default such as `string`."""
    with live_server(info=info) as running:
        schema = httpx.get(f"{running.url}/openapi.json").json()
    form = schema["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"]
    examples = {name: field["example"] for name, field in form["schema"]["properties"].items() if name != pictures}
    assert {name: value for name, value in examples.items() if value != ""} == form["example"]


@pytest.mark.parametrize("info", [FAKE_INFO, FAKE_VIDEO_INFO], ids=["pictures", "videos"])
def test_summaries_say_what_an_operation_does(info: ModelInfo) -> None:
    with live_server(info=info) as running:
        schema = httpx.get(f"{running.url}/openapi.json").json()
    summaries = [operation["summary"] for _, _, operation in operations(schema)]
    assert len(set(summaries)) == len(summaries)
    assert all(len(summary.split()) >= 3 for summary in summaries)


def test_the_schema_asks_for_a_key_where_one_is_needed(server: LiveServer) -> None:
    open_schema = httpx.get(f"{server.url}/openapi.json").json()
    assert "securitySchemes" not in open_schema.get("components", {})
    with live_server(settings={"requires_api_key": True}) as running:
        schema = [httpx.get(f"{running.url}/openapi.json").json() for _ in range(2)][1]
    (scheme,) = schema["components"]["securitySchemes"].items()
    assert (scheme[1]["type"], scheme[1]["scheme"]) == ("http", "bearer")
    for _, path, operation in operations(schema):
        assert operation.get("security") == ([{scheme[0]: []}] if path.startswith("/v1") else None), path
