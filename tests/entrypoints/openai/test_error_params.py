"""The `param` of an error is a path in the body that was sent, for every field and kind of value."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError

from vllm_omni.entrypoints.openai.errors import error_response
from vllm_omni.entrypoints.openai.requests.body_reader import validated
from vllm_omni.entrypoints.openai.schema.chat import ChatCompletionRequest, VideoChatRequest
from vllm_omni.entrypoints.openai.schema.images import (
    ErrorResponse,
    ImageEditRequest,
    ImageGenerationRequest,
    RequestBody,
)
from vllm_omni.entrypoints.openai.schema.videos import VideoRequest

VALUES: list[Any] = [
    3,
    -5,
    1.5,
    float("nan"),
    float("inf"),
    True,
    "x",
    [],
    [3],
    [None],
    [[]],
    [{}],
    ["x"],
    {},
    {"bool": 1},
]
VALUES += [{"name": 3}, {"name": "x", "scale": "y"}, {"name": "x", "bool": 1}, [{"bool": "x"}], [{"image_url": 3}]]
PYTHON_WORDS = ("item", "dictionary", "valid", "unable", "parse", "permitted")


def has_place(body: Any, param: str) -> bool:
    """Whether `param` leads to a value of `body`, or to a key that is missing there."""
    for part in param.split("."):
        if isinstance(body, list):
            if not part.isdigit():
                return False
            body = body[int(part)]
        elif isinstance(body, dict):
            body = body.get(part)
        else:
            return False
    return True


@pytest.mark.parametrize("is_form", [False, True])
@pytest.mark.parametrize(
    "model", [ImageGenerationRequest, ImageEditRequest, ChatCompletionRequest, VideoChatRequest, VideoRequest]
)
def test_a_param_is_a_place_in_the_body(model: type[RequestBody], is_form: bool) -> None:
    num_refused = 0
    for field in model.model_fields:
        for value in VALUES:
            body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], field: value}
            try:
                if is_form:
                    validated(lambda body=body: model.model_validate_strings(body, strict=False))  # type: ignore[misc]
                else:
                    validated(lambda body=body: model.model_validate(body))  # type: ignore[misc]
            except RequestValidationError as refusal:
                num_refused += 1
                error = ErrorResponse.model_validate_json(bytes(error_response(refusal).body)).error
                assert error.param is not None
                assert error.param.partition(".")[0] == field
                assert has_place(body, error.param), error
                assert not any(word in error.message for word in PYTHON_WORDS), error
    assert num_refused > 5 * len(model.model_fields)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("messages", {}, "messages: takes a list, got {}"),
        ("modalities", ["image", 5], "modalities.1: takes a string, got 5"),
        ("lora", {"name": 5}, "lora.name: takes a string, got 5"),
        ("lora", {"name": "ink", "path": "x"}, "lora.path: is no field that is taken here, got 'x'"),
        ("seed", 1.5, "seed: takes an integer, got 1.5"),
        ("seed", "one", "seed: takes an integer, got 'one'"),
        ("cache", "x", "cache: takes true or false, got 'x'"),
        ("strength", "much", "strength: takes a number, got 'much'"),
        ("guidance_scale", float("inf"), "guidance_scale: takes a finite number, got inf"),
        ("cfg_normalization", float("inf"), "cfg_normalization: takes a finite number, true or false, got inf"),
        ("cfg_normalization", "x", "cfg_normalization: takes a number, true or false, got 'x'"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_in_our_words(field: str, value: Any, message: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], field: value}
    with pytest.raises(RequestValidationError) as refused:
        validated(lambda: ChatCompletionRequest.model_validate(body))
    assert ErrorResponse.model_validate_json(bytes(error_response(refused.value).body)).error.message == message
