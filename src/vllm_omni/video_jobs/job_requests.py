"""Video jobs from checked prompts, and the prompts of stored jobs. A row has everything that the frames depend on."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import msgspec
from PIL import Image

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.control.request_builder import MAX_PREVIEWS, OPTIONAL_PARAMETERS, CheckedPrompt
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import LoRARequest, OmniDiffusionSamplingParams, OmniPrompt
from vllm_omni.jobs import Job
from vllm_omni.video_jobs.encoding import check_video_file
from vllm_omni.video_jobs.records import VideoJob, creation_time, new_job_id

MAX_PREVIEW_SHARE = 0.1
"""Most of a job's work that goes into previews: short jobs have fewer, or none."""
DEFAULT_FPS = 16
"""Frames a second of the file of a model that says none."""
_NOT_STORED = ("output_type", "num_outputs_per_prompt", "seconds")
"""Parameters that follow from others or are the same for every job."""


class _StoredAdapter(msgspec.Struct):
    name: str
    scale: float


class _StoredParams(msgspec.Struct):
    """Parameters that are more than a value of JSON; the others are checked with the request."""

    lora_request: list[_StoredAdapter] | None = None


class _StoredRequest(msgspec.Struct):
    prompt: str
    negative_prompt: str | None
    params: _StoredParams
    output_format: str


@dataclass(frozen=True)
class NewVideo:
    """A checked request for a video, as a route hands it over."""

    owner: str
    """See `VideoJob.owner`."""
    model: str
    """Name of the model in the request, or else the first served name."""
    prompt: OmniPrompt
    """Prompt with its decoded pictures."""
    checked: CheckedPrompt
    """Result of `AsyncOmni.check` for `prompt`."""
    input_files: tuple[bytes, ...] = ()
    """PNG files of the pictures: the job is run from these."""
    output_format: str = "mp4"
    """One of `OUTPUT_FORMATS`."""
    remixed_from: str | None = None
    idempotency_key: str | None = None
    """See `VideoJob.idempotency_key`."""


def new_job(new: NewVideo, job: Job, served_model: str, work_seconds: float, info: ModelInfo) -> VideoJob:
    """Row of a new job. `job`: the same request as the engine would run it, with its seed drawn and its price.

    Raises InvalidRequestError for a video that no file of the format can hold.
    """
    job_id, request = new_job_id(time.time()), job.requests[0].request
    params = replace(new.checked.params, seed=request.seed, num_frames=request.num_frames, fps=request.fps)
    # A default that the model does not take has no effect, but would be refused as a request's own value.
    not_taken: dict[str, Any] = {name: None for name in OPTIONAL_PARAMETERS if name not in info.parameters}
    params = replace(params, **not_taken)
    # By name, with their scales and also if there are none: the server that runs the job may have other defaults.
    adapters = [LoRARequest(lora.name, scale=lora.scale) for lora in request.loras]
    params = replace(params, lora_request=adapters, lora_scale=None)
    if info.gives_previews and not params.num_previews:
        params = replace(params, num_previews=num_affordable_previews(job))
    negative = new.checked.prompt.negative_prompt
    if negative is None and "negative_prompt" in info.parameters:
        negative = new.checked.defaults.get("negative_prompt")
    fps = request.fps or DEFAULT_FPS
    check_file(new.output_format, request)
    return VideoJob(
        id=job_id,
        owner=new.owner,
        model=new.model,
        served_model=served_model,
        status="queued",
        progress=0,
        created_at=creation_time(job_id),
        started_at=None,
        completed_at=None,
        expires_at=None,
        request={
            "prompt": new.checked.prompt.prompt,
            "negative_prompt": negative,
            "params": params_to_json(params),
            "output_format": new.output_format,
        },
        shown={
            "size": f"{request.width}x{request.height}",
            "seconds": f"{(request.num_frames - 1) / fps:.6g}",  # from the first frame to the last, as requests count
            "num_frames": request.num_frames,
            "fps": fps,
            "seed": request.seed,
            "num_inference_steps": request.num_inference_steps,
        },
        priority=params.priority,
        work_seconds=work_seconds,
        inputs=tuple(f"{job_id}/inputs/{number}.png" for number in range(len(new.input_files))),
        outputs={},
        checkpoint=None,
        remixed_from=new.remixed_from,
        idempotency_key=new.idempotency_key,
        error_code=None,
        error_message=None,
        num_attempts=0,
    )


def check_row(job: VideoJob) -> None:
    """Raise InvalidRequestError, which names the fault, for a stored request that this version cannot read."""
    try:
        msgspec.convert(job.request, _StoredRequest)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"the stored request cannot be read: {error}") from error


def check_repeats(new: NewVideo, row: VideoJob, earlier: VideoJob) -> None:
    """Raise InvalidRequestError unless `new` repeats the request of `earlier`, a job of the same idempotency key.

    `row`: the row that `new` would have. Contents of input pictures are not compared, nor what follows from the other
    fields.
    """
    not_compared = {"num_previews"} | ({"seed"} if new.checked.given.seed is None else set())  # a seed that was drawn
    if _compared(row, not_compared) != _compared(earlier, not_compared):
        raise InvalidRequestError(
            f"Idempotency-Key {row.idempotency_key!r:.80} has the video {earlier.id}, whose request was another one; "
            "each request needs a key of its own",
            param="Idempotency-Key",
        )


def _compared(job: VideoJob, not_compared: set[str]) -> tuple[Any, ...]:
    params = {name: value for name, value in job.request["params"].items() if name not in not_compared}
    return job.model, job.remixed_from, len(job.inputs), {**job.request, "params": params}


def check_file(output_format: str, request: DiffusionRequest) -> None:
    """Raise InvalidRequestError for a video that no file of the format can hold."""
    fps = request.fps or DEFAULT_FPS
    check_video_file(output_format, request.num_frames, request.height, request.width, fps)


def num_affordable_previews(job: Job) -> int:
    """Number of previews that take at most `MAX_PREVIEW_SHARE` of the work; each decodes one latent frame."""
    scheduled = job.requests[0]
    work = scheduled.cost.total(scheduled.num_steps)
    return min(MAX_PREVIEWS, int(MAX_PREVIEW_SHARE * work / scheduled.frame_cost)) if scheduled.frame_cost else 0


def params_to_json(params: OmniDiffusionSamplingParams) -> dict[str, Any]:
    """Fields of `params` that differ from their defaults, as JSON values. An adapter is stored by its name."""
    defaults, values = OmniDiffusionSamplingParams(), {}
    for field in fields(params):
        value = getattr(params, field.name)
        if field.name in _NOT_STORED or value == getattr(defaults, field.name):
            continue
        if field.name == "lora_request":
            adapters = [value] if isinstance(value, LoRARequest) else value
            value = [{"name": adapter.name, "scale": adapter.scale} for adapter in adapters]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            value = list(value)
        values[field.name] = value
    return values


def params_from_json(values: Mapping[str, Any]) -> OmniDiffusionSamplingParams:
    """Parameters from the values of `params_to_json`."""
    lora = values.get("lora_request")
    adapters = None if lora is None else [LoRARequest(each["name"], scale=each["scale"]) for each in lora]
    return OmniDiffusionSamplingParams(**{**values, "lora_request": adapters, "output_type": "np"})


def decoding_bytes(input_file: bytes) -> int:
    """Bytes that decoding a stored picture takes: its pixels, and at most as many resized. Reads its header alone."""
    with Image.open(io.BytesIO(input_file), formats=["PNG"]) as picture:
        width, height = picture.size
    return 2 * 3 * int(width * height)


def num_pixels(job: VideoJob) -> int:
    """Pixels of all frames of a stored job."""
    width, _, height = job.shown["size"].partition("x")
    return int(width) * int(height) * int(job.shown["num_frames"])


def stored_prompt(job: VideoJob, input_files: Sequence[bytes], prompt: str | None = None) -> OmniPrompt:
    """Prompt of a stored job with its pictures decoded, which takes time: for a thread. `prompt`: another text."""
    text = job.request["prompt"] if prompt is None else prompt
    pictures = [Image.open(io.BytesIO(data), formats=["PNG"]) for data in input_files]
    for picture in pictures:
        picture.load()
    return OmniPrompt(text, job.request["negative_prompt"], tuple(pictures))
