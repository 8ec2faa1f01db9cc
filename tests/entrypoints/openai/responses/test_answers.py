"""JSON around encoded pictures, and its timings."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from pydantic import TypeAdapter

from vllm_omni.entrypoints.openai.responses.answers import ResponseOptions, encode_all, json_with_list
from vllm_omni.entrypoints.openai.responses.encoding import ImageFormat
from vllm_omni.entrypoints.openai.schema.images import ImageGenerationRequest, ImagesResponse, Quality


@pytest.mark.parametrize(
    ("asked", "reported"),
    [("auto", "high"), ("hd", "high"), ("standard", "medium"), ("low", "low"), ("medium", "medium"), ("high", "high")],
)
def test_the_reported_quality_is_one_that_openai_knows(asked: Quality, reported: str) -> None:
    body = ImageGenerationRequest(prompt="x", quality=asked)
    assert ResponseOptions.of(body, ImageFormat("png", 100), ()).quality == reported


async def test_the_total_time_includes_the_encoding() -> None:
    async def item(data: bytes) -> bytes:
        await asyncio.sleep(0.01)
        return data

    items, measured = await encode_all([item(b"1"), item(b"2")], {"queue": 1.0, "total": 5.0})
    response = json_with_list({"timings": measured}, "data", items)
    body = b"".join([piece async for piece in response.body_iterator])  # type: ignore[misc]
    assert int(response.headers["content-length"]) == len(body)
    answer = json.loads(body)
    assert answer["data"] == [1, 2]
    timings = answer["timings"]
    assert timings["queue"] == 1.0
    assert timings["media_encode"] >= 0.009
    assert timings["total"] == pytest.approx(5.0 + timings["media_encode"], abs=1e-9)


def test_timings_say_tiling_as_a_boolean() -> None:
    """JSON's true, and not the number that Python's True equals."""
    timings = {"queue": 0.0, "vae_decode": 1.0, "vae_tiling": True}
    dumped = ImagesResponse.model_construct(timings=timings).model_dump_json(include={"timings"})
    assert json.loads(dumped)["timings"]["vae_tiling"] is True
    annotation: Any = ImagesResponse.model_fields["timings"].annotation
    assert TypeAdapter(annotation).validate_python(timings)["vae_tiling"] is True
