"""The path of every request for pictures from its parsed body to its response, shared by images and chat."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from fastapi import Request
from starlette.responses import Response

from vllm_omni.diffusion.control.request_builder import CheckedPrompt
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.entrypoints.openai.requests.body_reader import UploadBudget, UploadReservation, unless_disconnected
from vllm_omni.entrypoints.openai.requests.parameters import (
    IGNORED_FIELDS_HEADER,
    ignored_fields,
    parse_parameters,
)
from vllm_omni.entrypoints.openai.requests.pictures.pool import DecodePool
from vllm_omni.entrypoints.openai.requests.prompt_checker import PromptChecker
from vllm_omni.entrypoints.openai.requests.served_names import ServedNames
from vllm_omni.entrypoints.openai.responses.answers import Answer, EventStream, ResponseOptions
from vllm_omni.entrypoints.openai.responses.encoding import ImageEncoder
from vllm_omni.entrypoints.openai.schema.images import GenerationOptions, ImageOptions, StreamOptions
from vllm_omni.entrypoints.openai.settings import ServerSettings
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt
from vllm_omni.jobs import Job
from vllm_omni.omni import AsyncOmni

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PictureService:
    """Checks requests for pictures, runs them, and responds."""

    omni: AsyncOmni
    settings: ServerSettings
    budget: UploadBudget
    encoder: ImageEncoder
    decoder: DecodePool
    checker: PromptChecker

    @property
    def names(self) -> ServedNames:
        """Names that requests may give as their model."""
        return ServedNames(self.settings.served_model_names, self.omni.adapters)

    def ignored_fields(
        self, body: GenerationOptions, request: Request, has_guidance: bool
    ) -> tuple[tuple[str, ...], dict[str, str]]:
        """Names of the fields of `body` that have no effect, and the header with them; logs the names."""
        return self.note_ignored(ignored_fields(body, self.omni.info.guidance, has_guidance), request)

    def note_ignored(self, names: tuple[str, ...], request: Request) -> tuple[tuple[str, ...], dict[str, str]]:
        """`names` of fields without effect, and the header with them; logs the names."""
        if not names:
            return (), {}
        logger.info("%s: ignored fields: %s", request.url.path, ", ".join(names))
        return names, {IGNORED_FIELDS_HEADER: ",".join(names)}

    async def answer(
        self,
        body: ImageOptions,
        prompt: str,
        make_answer: Callable[[ResponseOptions], Answer],
        request: Request,
        reservation: UploadReservation,
    ) -> Response:
        """Run a request whose pictures to edit are in `reservation`, which is transferred to a stream.

        A stream ends long after this returns. Raises RequestError when the request is refused or fails, and when the
        client disconnects.
        """
        self.names.check(body.model)
        params, image_format = parse_parameters(body, self.names)
        if self.omni.info.makes_videos:  # the default is the length of a video
            params = replace(params, num_frames=1, seconds=None)

        def make(checked: CheckedPrompt, job: Job, ignored: tuple[str, ...]) -> Answer:
            return make_answer(ResponseOptions.of(body, image_format, ignored))

        return await self.run(body, prompt, params, make, request, reservation)

    async def run(
        self,
        body: StreamOptions,
        prompt: str,
        params: OmniDiffusionSamplingParams,
        make_answer: Callable[[CheckedPrompt, Job, tuple[str, ...]], Answer],
        request: Request,
        reservation: UploadReservation,
    ) -> Response:
        """Run a request with the given parameters; see `answer`.

        make_answer: gets the checked prompt, the engine's requests for it, and the names of fields without effect.
        """
        checked = await self.checker.check(
            OmniPrompt(prompt, body.negative_prompt, reservation.images), params, self.decoder
        )
        reservation.replace_images(checked.prompt.images)
        job = await self.checker.make_job(checked)
        ignored, headers = self.ignored_fields(body, request, job.requests[0].request.has_guidance)
        answer = make_answer(checked, job, ignored)
        outputs = self.omni.submit(job)
        if self.settings.log_requests:
            log_request([scheduled.request for scheduled in job.requests])
        if self.settings.log_prompts:
            logger.info("prompt %r, %s", checked.prompt, checked.given)
        if body.stream:
            events, silence = answer.events(outputs), self.settings.keep_alive_seconds
            return EventStream(outputs, events, silence, headers, reservation.transfer())
        async with aclosing(outputs):
            response = await unless_disconnected(request, answer.response(outputs))
        response.headers.update(headers)
        return response


def log_request(requests: Sequence[DiffusionRequest]) -> None:
    """Log one HTTP request. `requests`: the engine's requests for its `n` pictures, which differ in their seeds."""
    first = requests[0]
    adapter = " + ".join(f"{lora.name} x {lora.scale:g}" for lora in first.loras) or "none"
    length = f", frames {first.num_frames}" if first.num_frames > 1 else ""
    logger.info(
        "request %s: size %dx%d%s, steps %d, n %d, seed %d, adapter %s",
        first.request_id.removesuffix("-0"),
        first.width,
        first.height,
        length,
        first.num_inference_steps,
        len(requests),
        first.seed,
        adapter,
    )
