"""Fuzzing with schemathesis: no 500 for valid and invalid bodies, and errors are error objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, assume, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from testbed.live_server import FAKE_EDIT_INFO, FAKE_VIDEO_INFO, LiveServer, live_server
from testbed.patience import GUARD_SECONDS

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


TOO_LARGE = 413


def checks_of(response: Any) -> list[Any]:
    """Checks of a response. A body that is too large is refused by its size, before its fields are read."""
    return [check for check in CHECKS if check is not negative_data_rejection or response.status_code != TOO_LARGE]


OPERATIONS = {
    ("POST", "/v1/images/generations"): 40,
    ("POST", "/v1/chat/completions"): 20,
    ("GET", "/v1/images/files/{file_id}"): 15,
    ("GET", "/v1/models"): 1,
    ("GET", "/v1/models/{model}"): 15,
    ("GET", "/v1/loras"): 1,
    ("GET", "/health"): 1,
    ("GET", "/load"): 1,
    ("GET", "/ready"): 1,
    ("GET", "/version"): 1,
    ("GET", "/metrics"): 1,
}
"""Operations of a model that makes pictures from text, each with its number of examples in each mode."""
EDITS = ("POST", "/v1/images/edits")
NUM_EDIT_EXAMPLES = 20


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.thorough)], ids=["few", "many"])
def times(request: pytest.FixtureRequest) -> int:
    """Factor of the number of examples."""
    factor: int = request.param
    return factor


@pytest.fixture(scope="module")
def schema(server: LiveServer) -> schemathesis.schemas.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_operation_is_fuzzed(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path, methods in paths.items() for method in methods} == set(OPERATIONS)


def test_examples_that_the_schema_forbids(schema: schemathesis.schemas.BaseSchema, times: int) -> None:
    statuses = fuzz(schema, "POST", "/v1/images/generations", GenerationMode.NEGATIVE, times)
    assert set(statuses) == {400}


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda part: part)
def test_examples_that_the_schema_allows(
    schema: schemathesis.schemas.BaseSchema, method: str, path: str, times: int
) -> None:
    statuses = fuzz(schema, method, path, GenerationMode.POSITIVE, times)
    assert set(statuses) <= {200, 400, 404}
    if path == "/v1/images/generations":
        assert statuses[200] > 0, "some example makes a picture"


def test_event_streams_are_as_the_schema_says(schema: schemathesis.schemas.BaseSchema) -> None:
    body: dict[str, Any] = {"prompt": "x", "stream": True, "partial_images": 1}
    case = schema["/v1/images/generations"]["POST"].Case(body=body, media_type="application/json")
    response = case.call(timeout=GUARD_SECONDS)
    assert response.status_code == 200
    case.validate_response(response, checks=checks_of(response))


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
def test_edits_on_a_model_that_edits(mode: GenerationMode, times: int) -> None:
    with live_server(info=FAKE_EDIT_INFO) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        paths = schema.raw_schema["paths"]
        assert {(method.upper(), path) for path, methods in paths.items() for method in methods} == {
            *(operation for operation in OPERATIONS if operation[1] != "/v1/images/generations"),
            EDITS,
        }
        statuses = fuzz(schema, *EDITS, mode, times)
    assert set(statuses) <= ({400} if mode is GenerationMode.NEGATIVE else {200, 400, 404})


@pytest.mark.thorough
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/videos", "/v1/videos/sync", "/v1/images/generations"])
def test_bodies_on_a_model_that_makes_videos(path: str, mode: GenerationMode) -> None:
    with live_server(info=FAKE_VIDEO_INFO) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        statuses = fuzz(schema, "POST", path, mode, 1)
    assert set(statuses) <= ({400} if mode is GenerationMode.NEGATIVE else {200, 400, 404, 429})


def is_absent_in_a_form(value: Any) -> bool:
    """A form without empty lists and empty values, which mean that a field is absent."""
    return all(map(is_absent_in_a_form, value)) if isinstance(value, list) else value in ("", {})


def fuzz(
    schema: schemathesis.schemas.BaseSchema,
    method: str,
    path: str,
    mode: GenerationMode,
    times: int,
    operations: Mapping[tuple[str, str], int] = OPERATIONS,
) -> Counter[int]:
    """Number of responses with each status. `operations`: numbers of examples, to be multiplied by `times`."""
    statuses: Counter[int] = Counter()

    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=times * operations.get((method, path), NUM_EDIT_EXAMPLES),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def send(case: schemathesis.Case[Any]) -> None:
        if case.media_type == "multipart/form-data" and isinstance(case.body, dict):
            assume(not any(is_absent_in_a_form(value) for value in case.body.values()))
        response = case.call(timeout=GUARD_SECONDS)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=checks_of(response))
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    send()
    print(method, path, mode, dict(statuses))
    return statuses
