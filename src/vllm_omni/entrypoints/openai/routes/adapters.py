"""Routes of LoRA adapters: load, unload and list."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from vllm_omni.entrypoints.openai.errors import ERROR_RESPONSES
from vllm_omni.entrypoints.openai.requests.body_reader import BodyReader
from vllm_omni.entrypoints.openai.requests.parameters import unknown_fields
from vllm_omni.entrypoints.openai.routes.picture_service import PictureService
from vllm_omni.entrypoints.openai.schema.adapters import (
    LoadLoRAAdapterRequest,
    LoRACard,
    LoRAList,
    UnloadLoRAAdapterRequest,
)
from vllm_omni.entrypoints.openai.schema.images import RequestBody, json_request_body
from vllm_omni.errors import InvalidRequestError, ModelNotFoundError, RequestError, UnavailableError
from vllm_omni.inputs.adapter_paths import file_within, path_in_folders
from vllm_omni.inputs.data import LoRARequest
from vllm_omni.inputs.field_values import WrongValueError, shown

logger = logging.getLogger(__name__)

NOT_ENABLED = (
    "Adapters are loaded and unloaded over HTTP only if the server was started with --enable-lora-loading; "
    "GET /v1/loras lists those that it has."
)
_EXAMPLE = {"lora_name": "ink", "lora_path": "ink.safetensors"}
Body = TypeVar("Body", bound=RequestBody)


@dataclass(frozen=True)
class AdapterService:
    """Loads, unloads and lists the adapters of the engine."""

    pictures: PictureService
    bodies: BodyReader

    @property
    def is_enabled(self) -> bool:
        """Whether clients may load and unload."""
        return self.pictures.omni.config.enable_lora_loading

    async def load(self, request: Request) -> Response:
        """Load an adapter, and answer when all workers have read and checked it.

        Raises HTTPException (404) without --enable-lora-loading; InvalidRequestError for a name or a path that is not
        taken and for a file that does not fit; UnavailableError while the server starts or stops.
        """
        body = await self._read(request, LoadLoRAAdapterRequest)
        name = body.lora_name
        if name in self.pictures.settings.served_model_names:
            raise InvalidRequestError(
                f"lora_name: {name!r} is the name of the served model: give the adapter another one", param="lora_name"
            )
        file = await asyncio.to_thread(self._file_of, body.lora_path)
        with _own_names(file, body.lora_path):
            await self.pictures.omni.load_lora(LoRARequest(name, file), body.defaults, replace=body.load_inplace)
        return self._answer(f"Success: LoRA adapter '{name}' added successfully.", body, request)

    def _file_of(self, path: str) -> str:
        """File of an adapter. Raises InvalidRequestError."""
        try:
            return file_within(path, self.pictures.omni.config.lora_dirs)
        except WrongValueError as error:
            raise InvalidRequestError(f"lora_path takes {error}, got {shown(path)}", param="lora_path") from error
        except FileNotFoundError as error:
            raise ModelNotFoundError(
                f"lora_path: no folder of --lora-dir has {shown(path)}", param="lora_path"
            ) from error

    async def unload(self, request: Request) -> Response:
        """Unload an adapter: requests cannot name it from now on; answer when those that use it have ended.

        Raises ModelNotFoundError for an unknown name; HTTPException as `load`.
        """
        body = await self._read(request, UnloadLoRAAdapterRequest)
        if body.lora_name not in self.pictures.omni.adapters:
            raise ModelNotFoundError(f"lora_name: there is no LoRA adapter {shown(body.lora_name)}", param="lora_name")
        await self.pictures.omni.unload_lora(body.lora_name)
        return self._answer(f"Success: LoRA adapter '{body.lora_name}' removed successfully.", body, request)

    async def _read(self, request: Request, model: type[Body]) -> Body:
        """Body of a request to load or unload. Raises as `load`."""
        if not self.is_enabled:
            raise HTTPException(404, NOT_ENABLED)
        with self.pictures.budget.reserve() as reservation:
            body = await self.bodies.model(request, reservation, model, self.pictures.settings.max_body_bytes)
        state = self.pictures.omni.status().state
        if self.pictures.omni.ready is None or state not in ("running", "restarting"):
            raise UnavailableError(f"The engine loads and unloads no adapters: it is {state}.", retry_after=1.0)
        return body

    def _answer(self, text: str, body: RequestBody, request: Request) -> Response:
        """Answer of vLLM: one line of text."""
        logger.info("%s: %s", request.url.path, text)
        _, headers = self.pictures.note_ignored(unknown_fields(body), request)
        return PlainTextResponse(text, headers=headers)

    def list(self) -> LoRAList:
        """Adapters that requests may name."""
        omni = self.pictures.omni
        states = omni.adapter_states()
        cards = [
            LoRACard(
                id=adapter.name,
                file=path_in_folders(adapter.file, omni.config.lora_dirs),
                source=adapter.source,
                state=states.get(adapter.name, "disk"),
                defaults=dict(adapter.defaults),
            )
            for adapter in omni.adapters
        ]
        return LoRAList(data=cards)


_FIELDS = {"name": "lora_name", "path": "lora_path", "lora_request": "lora_path"}
"""Argument of `load_lora` -> field of a request's body."""


@contextmanager
def _own_names(file: str, path: str) -> Iterator[None]:
    """Name the fields of the body in the errors of the block, and the path that the client gave in place of `file`."""
    try:
        yield
    except RequestError as error:
        renamed = error.copy()
        renamed.param = _FIELDS.get(error.param or "", error.param)
        renamed.args = (str(error).replace(file, path),)
        raise renamed from error


def make_adapters_router(service: AdapterService) -> APIRouter:
    """The routes. The schema shows those that the server answers."""
    router = APIRouter(prefix="/v1", tags=["adapters"], responses=ERROR_RESPONSES)
    done: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @router.post(
        "/load_lora_adapter",
        summary="Load a LoRA adapter",
        response_class=PlainTextResponse,
        responses=done,
        openapi_extra={"requestBody": json_request_body(LoadLoRAAdapterRequest, _EXAMPLE)},
        include_in_schema=service.is_enabled,
    )
    async def load(request: Request) -> Response:
        """Load an adapter from a folder of `--lora-dir`. Requests under way go on."""
        return await service.load(request)

    @router.post(
        "/unload_lora_adapter",
        summary="Unload a LoRA adapter",
        response_class=PlainTextResponse,
        responses=done,
        openapi_extra={
            "requestBody": json_request_body(UnloadLoRAAdapterRequest, {"lora_name": _EXAMPLE["lora_name"]})
        },
        include_in_schema=service.is_enabled,
    )
    async def unload(request: Request) -> Response:
        """Unload an adapter. The answer comes when no request uses it any more."""
        return await service.unload(request)

    @router.get("/loras", summary="List the LoRA adapters", response_model=LoRAList)
    async def list_loras() -> LoRAList:
        """The adapters that a request's `lora` may name."""
        return service.list()

    return router
