"""OpenAI's error object for every failure."""

from __future__ import annotations

import math
import re
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from vllm_omni.diffusion.control.events import EngineObserver
from vllm_omni.entrypoints.openai.quotes import quote
from vllm_omni.entrypoints.openai.schema.images import UNION_TAGS, ErrorBody, ErrorResponse, ImageOptions
from vllm_omni.errors import RequestError, UnsupportedParameterError

# Name of a parameter in the engine -> name of the request's field.
_FIELD_NAMES = {
    "height": "size",
    "width": "size",
    "num_outputs_per_prompt": "n",
    "num_previews": "partial_images",
    "lora_request": "lora",
    "lora_scale": "lora.scale",
}
# Accepted values of fields for which the validator would quote a regular expression.
_PATTERNS = {"size": "takes auto or WIDTHxHEIGHT in pixels, such as 1024x1024"}
# Kind of a validator's error -> message for clients, where the validator's own message is about Python.
_MESSAGES = {
    "dict_type": "takes a JSON object",
    "model_type": "takes a JSON object",
    "model_attributes_type": "takes a JSON object",
    "too_short": "takes at least one entry",
    "list_type": "takes a list",
    "string_type": "takes a string",
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing", "int_parsing_size"), "takes an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "takes a number"),
    "finite_number": "takes a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "takes true or false"),
    "extra_forbidden": "is no field that is taken here",
}

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request is wrong or refused"},
    "5XX": {"model": ErrorResponse, "description": "The server cannot answer now, or failed"},
}
"""Error responses in the OpenAPI schema of each route."""


def error_response(error: Exception, request: Request | None = None) -> JSONResponse:
    """The HTTP response for any exception; an unknown exception is a 500 that reveals nothing about the server."""
    status, headers, body = 500, {"x-should-retry": "false"}, error_body(error)
    if isinstance(error, RequestError):
        status = error.status
        if error.retryable:  # SDKs retry 429 and 5xx by themselves
            headers = {"Retry-After": str(max(1, math.ceil(error.retry_after or 1)))}
    elif isinstance(error, RequestValidationError):
        status, body = 400, _validation_body(error)
    elif isinstance(error, HTTPException):
        status, headers, body = error.status_code, {**headers, **(error.headers or {})}, _http_body(error, request)
    return JSONResponse(ErrorResponse(error=body).model_dump(), status, headers)


def error_body(error: Exception) -> ErrorBody:
    """The error object of a response or of an event, for a failure in the engine."""
    if not isinstance(error, RequestError):
        return _error_object("The server failed on this request.", "server_error")
    message, param = str(error), error.param
    if isinstance(error, UnsupportedParameterError):
        message = error.message_among(ImageOptions.model_fields)
    elif param in _FIELD_NAMES:
        own_name, param = param, _FIELD_NAMES[param]
        message = re.sub(rf"^{own_name}\b", param, message)
    return _error_object(message, error.type, param, error.code)


def _error_object(message: str, kind: str, param: str | None = None, code: str | None = None) -> ErrorBody:
    """An error object in which lone surrogates, which UTF-8 cannot encode, are escaped."""
    return ErrorBody(
        message=_encodable(message), type=kind, param=None if param is None else _encodable(param), code=code
    )


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _validation_body(error: RequestValidationError) -> ErrorBody:
    first = error.errors()[0]
    # "[key]" is pydantic's word for a wrong key.
    where = [str(part) for part in first["loc"][1:] if part not in ("[key]", *UNION_TAGS)]
    message, param, code = first["msg"], ".".join(where) or None, "invalid_value"
    if first["type"] == "json_invalid":
        message, param, code = f"The request body is not valid JSON: {first['ctx']['error']}.", None, "invalid_json"
    elif param is None:
        message, code = (
            "The request needs a JSON object as its body, with content-type application/json.",
            "invalid_json",
        )
    elif first["type"] == "missing":
        message, code = f"{param} is required.", "missing_required_parameter"
    else:
        message = _MESSAGES.get(first["type"], message)
        if param == "lora" and first["type"] in ("dict_type", "model_type", "model_attributes_type"):
            message += ' such as {"name": "ink", "scale": 0.8}, or a list of them'
        if first["type"] == "string_pattern_mismatch":
            message = _PATTERNS.get(param, message)
        message = f"{param}: {message[:1].lower()}{message[1:]}, got {quote(first.get('input'))}"
    return _error_object(message, "invalid_request_error", param, code)


def _http_body(error: HTTPException, request: Request | None) -> ErrorBody:
    status = error.status_code
    message, code = str(error.detail), HTTPStatus(status).name.lower()
    if message == HTTPStatus(status).phrase and request is not None:
        message = f"{message}: {request.method} {request.url.path}"
    kind = "invalid_request_error" if status < 500 else "server_error"
    return _error_object(message, kind, code=code)


def install_error_handlers(app: FastAPI, observer: EngineObserver) -> None:
    """Add handlers for all exceptions; `observer` counts the requests that are refused as invalid."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        response = error_response(error, request)
        if response.status_code == 400:
            observer.on_reject("invalid")
        return response

    for kind in (RequestError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)
