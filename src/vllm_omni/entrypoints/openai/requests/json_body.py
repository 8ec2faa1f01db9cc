"""The text of a JSON body as a checked model. For a thread: a hostile body takes its sender's time, not the loop's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

Body = TypeVar("Body", bound=BaseModel)


def parse_json(data: bytearray) -> Any:
    """Raises RequestValidationError."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", type(error).__name__)
        raise _invalid({"type": "json_invalid", "loc": (), "msg": "", "input": {}, "ctx": {"error": reason}}) from error


def validated(validate: Callable[[], Body]) -> Body:
    """`validate()`. Raises RequestValidationError with the first thing that is wrong: an answer names one.

    The models bound their lists and objects before they look into them, so that no body makes many errors.
    """
    try:
        return validate()
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False, include_context=False)[0]) from error


def _invalid(error: Mapping[str, Any]) -> RequestValidationError:
    """As FastAPI raises it for bodies that it reads itself."""
    return RequestValidationError([{**error, "loc": ("body", *error["loc"])}])
