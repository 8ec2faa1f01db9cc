"""Middleware around the app that flags choose: API keys, CORS, and the user's own middleware."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any, cast

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from vllm_omni.entrypoints import vllm_api
from vllm_omni.entrypoints.openai.middlewares import CatchErrors, RequestId
from vllm_omni.entrypoints.openai.requests.parameters import IGNORED_FIELDS_HEADER
from vllm_omni.entrypoints.openai.routes.sleep import PROTECTED_PATHS
from vllm_omni.entrypoints.openai.settings import HttpOptions
from vllm_omni.errors import ConfigError

EXPOSED_HEADERS = (
    *("x-request-id", IGNORED_FIELDS_HEADER, "x-omni-seed", "retry-after", "x-should-retry", "www-authenticate"),
    *("openai-model", "openai-organization", "openai-poll-after-ms", "openai-processing-ms", "openai-version"),
    *("accept-ranges", "content-disposition", "content-length", "content-range", "date", "etag"),
)
"""Response headers that scripts of allowed origins may read."""


def api_keys(http: HttpOptions) -> list[str]:
    """Keys for `/v1` and `PROTECTED_PATHS`; if empty, no key is needed.

    `--api-key` takes precedence over vLLM's variable, as in vLLM.
    """
    return list(http.api_key) or [key for key in [vllm_api.configured_api_key()] if key]


def add_middleware(app: FastAPI, http: HttpOptions) -> None:
    """Add middleware to `app`: request ids are outermost, then the user's, CORS, the app's own, the API key.

    CORS is outside the API key so that browsers can read a 401. Raises ConfigError if a `--middleware` cannot be
    imported or is neither a class nor an async function.
    """
    if tokens := api_keys(http):
        # Inside the app's own middleware, so that a 401 has its x-request-id; outside every route.
        app.user_middleware.append(Middleware(vllm_api.ApiKeyMiddleware, tokens=tokens, paths=PROTECTED_PATHS))
    if http.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=http.allowed_origins,
            allow_credentials=http.allow_credentials,
            allow_methods=http.allowed_methods,
            allow_headers=http.allowed_headers,
            expose_headers=EXPOSED_HEADERS,
        )
    for path in http.middleware:
        target: Any = _import(path)
        if isinstance(target, type):
            app.user_middleware.insert(0, Middleware(cast(Any, target)))
        elif inspect.iscoroutinefunction(target):
            app.middleware("http")(target)
        else:
            raise ConfigError(f"--middleware takes a class or an async function, got {path!r}: {type(target).__name__}")
    if http.middleware:
        app.add_middleware(
            CatchErrors
        )  # errors of the user's middleware, and cancellations: functions prevent an answer inside
    # Request ids are outermost, so that responses of other middleware have them too; sorting keeps the order.
    app.user_middleware.sort(key=lambda middleware: cast(Any, middleware.cls) is not RequestId)


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--middleware takes an import path, got {path!r}: {error}") from error
