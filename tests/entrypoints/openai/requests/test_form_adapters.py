"""Adapters in forms: the fields of the OpenAI SDK, and refusals of what is not clear."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import httpx
import openai
import pytest

from vllm_omni.entrypoints.openai.requests.form_adapters import is_adapter_field, join_adapters, set_adapter
from vllm_omni.entrypoints.openai.requests.multipart import MultipartReader
from vllm_omni.entrypoints.openai.schema.videos import VideoRequest
from vllm_omni.errors import InvalidRequestError


def adapters_of(form: httpx.Request) -> list[tuple[str, float | None]]:
    """Names and scales that the server reads from a form."""
    reader = MultipartReader(form.headers["content-type"], lambda part: 1000)
    fields: dict[str, Any] = {"prompt": "x"}
    for part in reader.feed(form.read()):
        if is_adapter_field(part.name):
            set_adapter(fields, part.name, part.data.decode())
    reader.close()
    join_adapters(fields)
    adapters = VideoRequest.model_validate_strings(fields, strict=False).lora
    assert isinstance(adapters, list)
    return [(lora.name, lora.scale) for lora in adapters]


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
@pytest.mark.parametrize(
    ("given", "made"),
    [
        ([{"name": "a"}], [("a", None)]),
        ([{"name": "a", "scale": 2}], [("a", 2.0)]),
        ([{"name": "a"}, {"name": "b"}], [("a", None), ("b", None)]),
        ([{"name": "a", "scale": -1}, {"name": "b", "scale": 0.5}], [("a", -1.0), ("b", 0.5)]),
        (['{"name": "a"}', '{"name": "b", "scale": 0.5}'], [("a", None), ("b", 0.5)]),
        ([{"name": "a"}, {"name": "b", "scale": 0.5}], "got 2 names and 1 scales; JSON tells whose they are"),
        ([{"scale": 0.5}], "got 0 names and 1 scales"),
        ([{"name": "a"}, {"name": "b", "path": "c"}], "got a field 'lora[][path]'"),
    ],
)
def test_forms_of_the_sdk(given: list[Any], made: list[Any] | str) -> None:
    forms: list[httpx.Request] = []

    def keep(request: httpx.Request) -> httpx.Response:
        forms.append(request)
        return httpx.Response(200, json={})

    http = httpx.Client(transport=httpx.MockTransport(keep))
    with openai.OpenAI(api_key="none", base_url="http://omni/v1", http_client=http) as sdk:
        sdk.images.edit(image=("a.png", b"x", "image/png"), prompt="x", extra_body={"lora": given})
        sdk.videos.create(prompt="x", extra_body={"lora": given})
    assert len(forms) == 2
    for form in forms:
        if isinstance(made, list):
            assert adapters_of(form) == made
        else:
            with pytest.raises(InvalidRequestError, match=re.escape(made)) as refused:
                adapters_of(form)
            assert refused.value.param == "lora"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("lora[0][name]",), "lora[name] and lora[scale] for one adapter, lora[][name] and"),
        (("lora[][path]",), "for several, got a field 'lora[][path]'"),
        (("lora[]",), 'lora[] takes a JSON object such as {"name": "ink", "scale": 0.8}, got'),
        (("lora[][name]", "lora[]"), "once each, got another 'lora[]'"),
        (("lora", "lora[][name]"), "once each, got another 'lora[][name]'"),
        (("lora[][scale]", "lora[name]"), "once each, got another 'lora[name]'"),
        (("lora[name]", "lora[1][name]"), "for several, got a field"),
        (("lora", "lora[scale]"), "once each, got another 'lora[scale]'"),
        (("lora[scale]", "lora"), "once each, got another 'lora'"),
        (("lora", "lora"), "once each, got another 'lora'"),
        (("lora[name]", "lora[name]"), "once each, got another 'lora[name]'"),
    ],
)
def test_a_form_drops_no_adapter(names: Sequence[str], words: str) -> None:
    fields: dict[str, Any] = {}
    *others, last = names
    for name in others:
        set_adapter(fields, name, "[]" if name == "lora" else "1")
    with pytest.raises(InvalidRequestError, match=re.escape(words)) as refused:
        set_adapter(fields, last, "[]" if last == "lora" else "1")
    assert refused.value.param == "lora"
