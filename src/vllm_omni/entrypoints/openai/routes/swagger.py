"""`/docs`: Swagger UI from files on this machine, and API keys in the OpenAPI schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from vllm_omni.entrypoints.openai.routes.sleep import PROTECTED_PATHS

DOCS_PATH = "/docs"
OPENAPI_PATH = "/openapi.json"
SCRIPT, STYLE = "swagger-ui-bundle.js", "swagger-ui.css"
_CONTENT_TYPES = {SCRIPT: "text/javascript", STYLE: "text/css"}
_NO_FAVICON = "data:,"
"""Empty icon of the page: without one, FastAPI's page loads an icon from a web site."""
_KEY_SCHEME = "ApiKey"


def make_docs_router(title: str, folder: Path | None) -> APIRouter:
    """Routes of the page and its two files. folder: their folder; if they are missing, the page is a 404."""
    router = APIRouter(include_in_schema=False)

    @router.get(DOCS_PATH)
    async def docs(request: Request) -> Response:
        _file(folder, SCRIPT), _file(folder, STYLE)
        root_path = request.scope.get("root_path", "").rstrip("/")
        return get_swagger_ui_html(
            openapi_url=root_path + OPENAPI_PATH,
            title=f"{title} - Swagger UI",
            swagger_js_url=f"{root_path}{DOCS_PATH}/{SCRIPT}",
            swagger_css_url=f"{root_path}{DOCS_PATH}/{STYLE}",
            swagger_favicon_url=_NO_FAVICON,
            # Otherwise the page sends the schema's address to a validator on the web.
            swagger_ui_parameters={"validatorUrl": None},
        )

    @router.get(f"{DOCS_PATH}/{{name}}")
    async def docs_file(name: str) -> Response:
        if name not in _CONTENT_TYPES:
            raise HTTPException(404)
        return FileResponse(_file(folder, name), media_type=_CONTENT_TYPES[name])

    return router


def _file(folder: Path | None, name: str) -> Path:
    """Path of a file in `folder`. Raises HTTPException (404) if the file is missing."""
    if folder is None or not (path := folder / name).is_file():
        raise HTTPException(
            404,
            f"This installation of vLLM has no files of Swagger UI, so there is no page; the schema is {OPENAPI_PATH}.",
        )
    return path


def require_api_key(app: FastAPI) -> None:
    """Declare in the schema of `app` which routes take a bearer token: Swagger UI then asks for it."""
    make_schema = app.openapi

    def with_keys() -> dict[str, Any]:
        schema = make_schema()
        schemes = schema.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes[_KEY_SCHEME] = {"type": "http", "scheme": "bearer", "description": "A key of --api-key."}
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                if path.startswith("/v1") or path in PROTECTED_PATHS:
                    operation["security"] = [{_KEY_SCHEME: []}]
        return schema

    app.openapi = with_keys  # type: ignore[method-assign]  # FastAPI's documented way to extend the schema
