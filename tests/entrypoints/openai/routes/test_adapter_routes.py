"""Routes that load and unload adapters: who may, with which bodies, and while other things happen."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from testbed.live_server import FAKE_VIDEO_INFO, MODEL_NAME, LiveServer, live_server
from tests.entrypoints.openai.routes.test_image_errors import error_of
from tests.entrypoints.openai.routes.test_probes_and_metrics import read_metrics
from tests.entrypoints.openai.routes.videos import Paused, made
from vllm_omni.diffusion.messages.plan import WorkerReady

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
GENERATIONS = "/v1/images/generations"
NUM_CLIENTS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters whose files nobody reads: the device is a fake."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in (MODEL_NAME, "ink", *map(str, range(NUM_CLIENTS))):
        (folder / f"{name}.safetensors").touch()
    return folder


@pytest.fixture(scope="module")
def loading(folder: Path) -> Iterator[LiveServer]:
    """A server whose clients may load adapters."""
    with live_server(lora_dirs=(str(folder),), enable_lora_loading=True) as running:
        yield running


@pytest.fixture(scope="module")
def client(loading: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=loading.url) as client:
        yield client


def load(client: httpx.Client, name: str, path: str = "ink.safetensors", **fields: Any) -> httpx.Response:
    return client.post(LOAD, json={"lora_name": name, "lora_path": path, **fields})


def unload(client: httpx.Client, name: str) -> httpx.Response:
    return client.post(UNLOAD, json={"lora_name": name})


def test_the_schema_has_the_routes_with_examples_that_run(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {path for path in paths if "lora" in path} == {"/v1/loras", LOAD, UNLOAD}
    for route in (LOAD, UNLOAD):
        content = paths[route]["post"]["requestBody"]["content"]["application/json"]
        assert client.post(route, json=content["example"]).text.startswith("Success: LoRA adapter 'ink' ")


def post(client: httpx.Client, route: str, body: dict[str, Any]) -> httpx.Response:
    """Answer to a body that may hold lone surrogates, which httpx itself cannot encode."""
    return client.post(route, content=json.dumps(body), headers={"content-type": "application/json"})


GOOD = {"lora_name": "new", "lora_path": "ink.safetensors"}


VALUES: tuple[Any, ...] = ("", 3, ["ink"], {}, "x" * 5000)


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        *(({field: None}, 400, field) for field in GOOD),
        *(({field: value}, 400, field) for field in GOOD for value in VALUES),
        *(({"lora_name": name}, 400, "lora_name") for name in ("a\nb", "a\x1b[0m", " a", "\ud800", MODEL_NAME)),
        *(
            ({"lora_path": path}, 400, "lora_path")
            for path in ("../x", "/etc/passwd", "a\0b", "\ud800", ".", f"{MODEL_NAME}.txt/..")
        ),
        ({"lora_path": "nothing.safetensors"}, 404, "lora_path"),
        ({"load_inplace": "yes"}, 400, "load_inplace"),
        ({"is_3d_lora_weight": True}, 400, "is_3d_lora_weight"),
        *(({"defaults": value}, 400, "defaults") for value in (*VALUES[1:3], {"steps": 1}, {"sigmas": [0.1, 0.5]})),
        ({"defaults": {"num_inference_steps": 10**6}}, 400, "defaults"),
        ({"defaults": {f"{number}": 1 for number in range(65)}}, 400, "defaults"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode(),
)
def test_a_wrong_body_is_told_by_its_field(
    client: httpx.Client, change: dict[str, Any], status: int, param: str
) -> None:
    body = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    refused = post(client, LOAD, body)
    error = error_of(refused)
    assert (refused.status_code, error["param"]) == (status, param)


def test_other_bodies_are_refused_as_on_other_routes(client: httpx.Client) -> None:
    for content, kind, status in (
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"lora_name=ink", "application/x-www-form-urlencoded", 400),
        (b'{"lora_name": "' + b"x" * 2**21 + b'"}', "application/json", 413),
    ):
        for route in (LOAD, UNLOAD):
            refused = client.post(route, content=content, headers={"content-type": kind})
            assert refused.status_code == status
            error_of(refused)
    assert client.get(LOAD).status_code == 405


def test_nothing_wrong_was_loaded_and_the_models_name_hides_a_file_of_a_folder(client: httpx.Client) -> None:
    assert "new" not in client.get("/v1/loras").text
    models = [card["id"] for card in client.get("/v1/models").json()["data"]]
    assert models.count(MODEL_NAME) == 1
    assert "parent" not in client.get(f"/v1/models/{MODEL_NAME}").json()


@pytest.mark.thorough
def test_a_storm_of_clients(loading: LiveServer, client: httpx.Client) -> None:
    before = read_metrics(loading)
    with ThreadPoolExecutor(NUM_CLIENTS + 1) as threads:

        def at_once(call: Any) -> list[httpx.Response]:
            futures = [threads.submit(call, number) for number in range(NUM_CLIENTS)]
            assert client.get("/health").status_code == 200
            return [future.result() for future in futures]

        with Paused(loading):
            picture = threads.submit(client.post, GENERATIONS, json={"prompt": "x", "num_inference_steps": 3})
            same = at_once(lambda _: load(client, "same"))
            assert Counter(response.status_code for response in same) == {200: 1, 400: NUM_CLIENTS - 1}
            messages = [error_of(response)["message"] for response in same if response.status_code == 400]
            assert all("has already been loaded" in text or "is being loaded" in text for text in messages), messages
            others = at_once(lambda number: load(client, f"n{number}", f"{number}.safetensors"))
            assert {response.status_code for response in others} == {200}
            gone = at_once(lambda _: unload(client, "same"))
            assert Counter(response.status_code for response in gone) == {200: 1, 404: NUM_CLIENTS - 1}
        assert picture.result().status_code == 200
        assert {response.status_code for response in at_once(lambda number: unload(client, f"n{number}"))} == {200}
    after = read_metrics(loading)
    assert after["vllm_omni:lora_loads_total"] - before["vllm_omni:lora_loads_total"] == NUM_CLIENTS + 1
    assert after["vllm_omni:lora_load_seconds_count"] == after["vllm_omni:lora_loads_total"]
    states = {state: after[f"vllm_omni:lora_adapters{{state={state}}}"] for state in ("device", "host", "disk")}
    assert sum(states.values()) == len(client.get("/v1/loras").json()["data"])


def test_an_unload_waits_for_requests_that_use_the_adapter(loading: LiveServer, client: httpx.Client) -> None:
    with ThreadPoolExecutor(3) as threads:
        assert load(client, "used").status_code == 200
        with Paused(loading):
            picture = threads.submit(client.post, GENERATIONS, json={"prompt": "x", "model": "used"})
            loading.wait_until(lambda: loading.num_unfinished() == 1)
            leaving: Future[httpx.Response] = threads.submit(unload, client, "used")
            loading.wait_until(lambda: "used" not in loading.omni.adapters)
            assert client.post(GENERATIONS, json={"prompt": "x", "model": "used"}).status_code == 404
            assert client.post(GENERATIONS, json={"prompt": "x", "lora": {"name": "used"}}).status_code == 400
            second = unload(client, "used")
            assert (second.status_code, error_of(second)["param"]) == (404, "lora_name")
            assert not leaving.done()
        assert picture.result().status_code == 200
        assert leaving.result().text == "Success: LoRA adapter 'used' removed successfully."


@pytest.mark.thorough
def test_a_restarting_engine_loads_later_and_a_stopping_one_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with live_server(lora_dirs=(str(folder),), enable_lora_loading=True) as running, ThreadPoolExecutor(2) as threads:
        gate, start = asyncio.Event(), running.device.start

        async def start_later() -> WorkerReady:
            await gate.wait()
            return await start()

        monkeypatch.setattr(running.device, "start", start_later)
        with Paused(running):
            picture = threads.submit(httpx.post, running.url + GENERATIONS, json={"prompt": "x"})
            running.wait_until(lambda: bool(running.device.pending))
            running.call(running.device.die)
            running.wait_until(lambda: running.omni.status().state == "restarting")
            loaded = threads.submit(httpx.post, running.url + LOAD, json=GOOD)
            assert httpx.get(f"{running.url}/v1/loras").status_code == 200
            running.call(gate.set)
        assert (picture.result().status_code, loaded.result().status_code) == (200, 200)
        running.call(running.omni.begin_drain)
        refused = httpx.post(running.url + LOAD, json=GOOD)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "unavailable")
        assert "retry-after" in refused.headers


@pytest.mark.thorough
def test_a_video_has_the_recipe_of_its_adapter(folder: Path) -> None:
    with (
        live_server(
            info=FAKE_VIDEO_INFO,
            lora_modules={"fast": str(folder / "ink.safetensors")},
            lora_defaults={"fast": {"num_inference_steps": 2, "num_frames": 5}},
        ) as running,
        httpx.Client(base_url=running.url) as http,
    ):
        video = made(http, model="fast")
        assert (video["model"], video["num_frames"], video["num_inference_steps"]) == ("fast", 5, 2)
        assert made(http, model="fast", seconds=1)["num_frames"] == 9
        picture = http.post(GENERATIONS, json={"prompt": "x", "lora": {"name": "fast"}}).json()
        assert picture["timings"]["computed_steps"] == 2, "and one frame, although the recipe has five"
