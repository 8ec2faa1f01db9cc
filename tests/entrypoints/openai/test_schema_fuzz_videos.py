"""Fuzzing of the routes of a model that makes videos: no 500, and errors are error objects."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from schemathesis import GenerationMode

from testbed.live_server import FAKE_VIDEO_INFO, LiveServer, live_server
from tests.entrypoints.openai.test_schema_fuzz import fuzz, times

__all__ = ["times"]

pytestmark = pytest.mark.thorough

OPERATIONS = {
    ("POST", "/v1/videos"): 15,
    ("GET", "/v1/videos"): 15,
    ("POST", "/v1/videos/sync"): 15,
    ("GET", "/v1/videos/{video_id}"): 5,
    ("DELETE", "/v1/videos/{video_id}"): 5,
    ("POST", "/v1/videos/{video_id}/remix"): 10,
    ("GET", "/v1/videos/{video_id}/content"): 10,
    ("GET", "/v1/videos/{video_id}/events"): 5,
}
"""Operations of videos, each with its number of examples in each mode."""
WITH_BODIES = [operation for operation in OPERATIONS if operation[0] == "POST"]
WITH_QUERIES = [("GET", "/v1/videos"), ("GET", "/v1/videos/{video_id}/content")]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(info=FAKE_VIDEO_INFO) as running:
        yield running


@pytest.fixture(scope="module")
def schema(server: LiveServer) -> schemathesis.schemas.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_operation_on_videos_is_fuzzed(schema: schemathesis.schemas.BaseSchema) -> None:
    paths = schema.raw_schema["paths"]
    found = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert {operation for operation in found if "videos" in operation[1]} == set(OPERATIONS)
    for method, path in found:
        assert paths[path][method.lower()]["summary"]


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda part: part)
def test_examples_that_the_schema_allows(
    schema: schemathesis.schemas.BaseSchema, method: str, path: str, times: int
) -> None:
    statuses = fuzz(schema, method, path, GenerationMode.POSITIVE, times, OPERATIONS)
    assert set(statuses) <= {200, 400, 404}
    if (method, path) == ("POST", "/v1/videos"):
        assert statuses[200] > 0, "some example makes a video"


@pytest.mark.parametrize(("method", "path"), WITH_BODIES + WITH_QUERIES, ids=lambda part: part)
def test_examples_that_the_schema_forbids(
    schema: schemathesis.schemas.BaseSchema, method: str, path: str, times: int
) -> None:
    statuses = fuzz(schema, method, path, GenerationMode.NEGATIVE, times, OPERATIONS)
    if method == "POST":  # a query that is changed may be one that the schema allows
        assert set(statuses) <= {400, 404}
