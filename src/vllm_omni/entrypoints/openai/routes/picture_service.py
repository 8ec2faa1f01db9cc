"""The path of every request for pictures from its parsed body to its response, shared by images and chat."""

from __future__ import annotations

import logging
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import Request
from starlette.responses import Response

from vllm_omni.diffusion.control.request_builder import CheckedPrompt
from vllm_omni.entrypoints.openai.disconnect import unless_disconnected
from vllm_omni.entrypoints.openai.requests.ignored_fields import ignored_fields, ignored_fields_header
from vllm_omni.entrypoints.openai.requests.parameters import check_model_name, parse_parameters
from vllm_omni.entrypoints.openai.requests.pictures.pool import DecodePool
from vllm_omni.entrypoints.openai.requests.prompt_checker import PromptChecker
from vllm_omni.entrypoints.openai.requests.upload_budget import UploadBudget, UploadReservation
from vllm_omni.entrypoints.openai.responses.answers import Answer, ResponseOptions
from vllm_omni.entrypoints.openai.responses.encoding import ImageEncoder
from vllm_omni.entrypoints.openai.responses.event_stream import EventStream
from vllm_omni.entrypoints.openai.routes.request_log import log_request
from vllm_omni.entrypoints.openai.schema.images import ImageOptions
from vllm_omni.entrypoints.openai.settings import ServerSettings
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import OmniPrompt
from vllm_omni.jobs import Job, OutputStream
from vllm_omni.omni import AsyncOmni

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AcceptedRequest:
    """A request that is checked and priced, and does not run yet."""

    job: Job
    checked: CheckedPrompt
    options: ResponseOptions
    stream: bool
    headers: dict[str, str]
    """Headers of the response."""


@dataclass(frozen=True)
class PictureService:
    """Checks requests for pictures, runs them, and responds."""

    omni: AsyncOmni
    settings: ServerSettings
    budget: UploadBudget
    encoder: ImageEncoder
    decoder: DecodePool
    checker: PromptChecker

    def check_makes_pictures(self) -> None:
        """Raise InvalidRequestError if the model makes videos. Called once a request, before its body is read."""
        if self.omni.info.makes_videos:
            raise InvalidRequestError(
                "The served model makes videos, which are made offline only yet, by vllm_omni.Omni: this server has no "
                "route for them.",
                param="model",
            )

    def check_model_name(self, body: ImageOptions) -> None:
        """Raise ModelNotFoundError unless `body` names the served model, one of its adapters, or nothing."""
        check_model_name(body.model, (*self.settings.served_model_names, *self.omni.config.lora_modules))

    def ignored_fields(
        self, body: ImageOptions, request: Request, has_guidance: bool
    ) -> tuple[tuple[str, ...], dict[str, str]]:
        """Names of the fields of `body` that have no effect, and the header with them; logs the names."""
        names = ignored_fields(body, self.omni.info.guidance, has_guidance)
        if names:
            logger.info("%s: ignored fields: %s", request.url.path, ", ".join(names))
        return names, ignored_fields_header(names)

    async def accept(
        self, body: ImageOptions, prompt: str, request: Request, reservation: UploadReservation
    ) -> AcceptedRequest:
        """Check a request whose pictures to edit are in `reservation`. Raises RequestError."""
        self.check_model_name(body)
        params, image_format = parse_parameters(body, self.omni.config.lora_modules)
        checked = await self.checker.check(
            OmniPrompt(prompt, body.negative_prompt, reservation.images), params, self.decoder
        )
        reservation.replace_images(checked.prompt.images)
        job = await self.checker.make_job(checked)
        ignored, headers = self.ignored_fields(body, request, job.requests[0].request.has_guidance)
        return AcceptedRequest(job, checked, ResponseOptions.of(body, image_format, ignored), body.stream, headers)

    async def respond(
        self, accepted: AcceptedRequest, answer: Answer, request: Request, reservation: UploadReservation
    ) -> Response:
        """Run a request. `reservation` is transferred to a stream, which ends long after this returns.

        Raises RequestError when the engine refuses the request or fails on it, and when the client disconnects.
        """
        outputs = self.omni.submit(accepted.job)
        if self.settings.log_requests:
            log_request([scheduled.request for scheduled in accepted.job.requests])
        if self.settings.log_prompts:
            logger.info("prompt %r, %s", accepted.checked.prompt, accepted.checked.given)
        if accepted.stream:
            events, silence = answer.events(outputs), self.settings.keep_alive_seconds
            return EventStream(outputs, events, silence, accepted.headers, reservation.transfer())
        async with aclosing(outputs):
            response = await unless_disconnected(request, _finish(outputs, answer))
        response.headers.update(accepted.headers)
        return response


async def _finish(outputs: OutputStream, answer: Answer) -> Response:
    async for output in outputs:
        if output.finished:
            return await answer.response(output)
    raise AssertionError("a stream of outputs ends with its result or an error")
