"""Chat completions of a model that makes videos."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastapi import Request
from starlette.responses import Response

from vllm_omni.diffusion.control.request_builder import CheckedPrompt
from vllm_omni.entrypoints.openai.requests.body_reader import UploadReservation
from vllm_omni.entrypoints.openai.requests.parameters import sampling_params
from vllm_omni.entrypoints.openai.responses.chat import ChatEnvelope
from vllm_omni.entrypoints.openai.responses.video_chat import VideoChatAnswer
from vllm_omni.entrypoints.openai.routes.picture_service import PictureService
from vllm_omni.entrypoints.openai.routes.video_service import check_is_video, owner_of, png_files
from vllm_omni.entrypoints.openai.routes.videos import CONTENT_ROUTE
from vllm_omni.entrypoints.openai.schema.chat import VideoChatRequest
from vllm_omni.jobs import Job
from vllm_omni.video_jobs.encoding import EncodedVideo
from vllm_omni.video_jobs.job_requests import NewVideo, check_file
from vllm_omni.video_jobs.service import VideoJobs


@dataclass(frozen=True)
class VideoChat:
    """Makes the videos of chats. They run without jobs in the store, but a large file is kept as a completed job."""

    pictures: PictureService
    jobs: VideoJobs

    async def answer(
        self,
        body: VideoChatRequest,
        prompt: str,
        envelope: ChatEnvelope,
        request: Request,
        reservation: UploadReservation,
    ) -> Response:
        """Answer a chat whose pictures are in `reservation`. Raises as `PictureService.answer`."""
        pictures = self.pictures
        pictures.names.check(body.model)
        params = sampling_params(body, pictures.names)
        files = await png_files(pictures.encoder, reservation.images)

        def make_answer(checked: CheckedPrompt, job: Job, ignored: tuple[str, ...]) -> VideoChatAnswer:
            check_is_video(checked, body)
            check_file(body.output_format, job.requests[0].request)
            single = replace(checked, params=replace(checked.params, num_outputs_per_prompt=1))
            new = NewVideo(
                owner_of(request, pictures.settings), envelope.model, checked.prompt, single, files, body.output_format
            )

            async def keep(index: int, encoded: EncodedVideo) -> str:
                kept = await self.jobs.keep(new, replace(job, requests=[job.requests[index]]), encoded)
                return str(request.url_for(CONTENT_ROUTE, video_id=kept.id))

            return VideoChatAnswer(
                envelope,
                body.safety_identifier,
                ignored,
                lambda outputs: self.jobs.encode(job, outputs, body.output_format),
                keep,
            )

        return await pictures.run(body, prompt, params, make_answer, request, reservation)
