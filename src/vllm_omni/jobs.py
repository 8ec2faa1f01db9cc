"""A running `generate` call (`Job`), and the stream of its outputs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vllm_omni.diffusion.control.events import (
    Checkpointed,
    EncodeAdvanced,
    EngineEvent,
    Failed,
    Finished,
    Frames,
    Preview,
    StepDone,
)
from vllm_omni.diffusion.control.owner import EngineOwner
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.errors import RequestError
from vllm_omni.outputs import OmniRequestOutput


@dataclass
class Job:
    """One running `generate` call: its requests, and the finished images and timings by request id."""

    request_id: str
    prompt: str
    output_type: str
    requests: list[ScheduledRequest]
    ignored: str = ""
    """Parameters that have no effect on these requests, and the setting that each of them needs; else empty."""
    images: dict[str, np.ndarray] = field(default_factory=dict)
    timings: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._indices = {request.request_id: index for index, request in enumerate(self.requests)}
        self._steps = [0 if request.resume is None else request.resume.step for request in self.requests]
        """Denoising steps done, of each request."""
        self._begun: set[int] = set()
        """Numbers of the requests whose first plan has begun."""

    @property
    def is_done(self) -> bool:
        """Whether every picture is finished."""
        return len(self.images) == len(self.requests)

    @property
    def pending(self) -> list[str]:
        """Ids of the requests whose picture is not finished."""
        return [r.request_id for r in self.requests if r.request_id not in self.images]

    def progress(self, event: EngineEvent) -> OmniRequestOutput:
        index = self._indices[event.request_id]
        request, done = self.requests[index], isinstance(event, Finished)
        frames = event if isinstance(event, Frames) else None
        if not isinstance(event, Checkpointed):  # one that is asked for may come before the first plan
            self._begun.add(index)
        if isinstance(event, StepDone | Preview):
            self._steps[index] = max(self._steps[index], event.step)  # a replay may deliver a late preview
        return self._output(
            [request],
            images=[self._image(event.image)] if isinstance(event, Finished | Preview) else [],
            timings=event.timings if isinstance(event, Finished) else {},
            index=index,
            started=index in self._begun,
            encoded_share=event.share if isinstance(event, EncodeAdvanced) else 0.0,
            step=request.num_steps if done or frames else self._steps[index],
            num_output_tokens=request.num_image_tokens if done else 0,
            first_frame=frames.first if frames else 0,
            frames=frames.pixels if frames else None,
            checkpoint=event.checkpoint if isinstance(event, Checkpointed) else None,
            checkpointed=isinstance(event, Checkpointed),
        )

    def result(self) -> OmniRequestOutput:
        return self._output(
            self.requests,
            images=[self._image(self.images[r.request_id]) for r in self.requests],
            timings=max(self.timings.values(), key=lambda timings: timings["total"]),
            finished=True,
            started=True,
            step=self.requests[0].num_steps,
            num_output_tokens=sum(r.num_image_tokens for r in self.requests),
        )

    def failure(self, error: RequestError) -> OmniRequestOutput:
        """Output that holds `error` in place of images."""
        return self._output(self.requests, finished=True, error=error)

    def _output(self, requests: list[ScheduledRequest], **fields: Any) -> OmniRequestOutput:
        """Output about some requests of the job, with what is the same for all of them."""
        first = requests[0]
        return OmniRequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            seeds=[r.request.seed for r in requests],
            fps=first.request.fps if first.request.num_frames > 1 else None,
            num_inference_steps=first.num_steps,
            num_prompt_tokens=first.num_prompt_tokens,
            num_input_image_tokens=first.num_reference_tokens,
            **fields,
        )

    def _image(self, pixels: np.ndarray) -> Any:
        """Pixels in the form of `output_type`; as PIL images, a video [frames, height, width, 3] becomes a list."""
        if self.output_type == "np":
            return pixels
        return [Image.fromarray(frame) for frame in pixels] if pixels.ndim == 4 else Image.fromarray(pixels)


@dataclass(eq=False)
class OutputStream:
    """Outputs of one `generate` call, as they arrive; `aclose()` before the end aborts its requests."""

    _job: Job
    _events: asyncio.Queue[EngineEvent]
    _end: Callable[[Job], None]
    _owner: EngineOwner
    _finished: bool = False

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> OmniRequestOutput:
        if self._finished:
            raise StopAsyncIteration
        self._owner.check_loop()
        if self._job.is_done:
            await self.aclose()
            return self._job.result()
        try:
            event = await self._events.get()
            if isinstance(event, Failed):
                raise event.error
        except BaseException:  # also a cancellation: the requests of a cancelled reader must end
            await self.aclose()
            raise
        if isinstance(event, Finished):
            self._job.images[event.request_id] = event.image
            self._job.timings[event.request_id] = event.timings
        return self._job.progress(event)

    async def aclose(self) -> None:
        self._owner.check_loop()
        self.stop()

    def stop(self) -> None:
        """Abort the requests that still run; for callers that cannot await `aclose`."""
        self._finished = True
        self._end(self._job)

    def failure(self, error: RequestError) -> OmniRequestOutput:
        """Output of a stream that ended with `error`."""
        return self._job.failure(error)


async def last_output(stream: OutputStream, steps_bar: tqdm, frames_bar: tqdm) -> OmniRequestOutput:
    """Final output of a stream: the result, or an output that holds the error.

    The bars count denoising steps, and frames of videos that are decoded in pieces.
    """
    steps: dict[int, int] = {}
    try:
        async for output in stream:
            if output.finished:
                return output
            steps_bar.update(output.step - steps.get(output.index, 0))
            steps[output.index] = output.step
            if output.frames is not None:
                frames_bar.update(len(output.frames))
    except RequestError as error:
        return stream.failure(error)
    finally:
        await stream.aclose()
    raise AssertionError("a stream ends with its result or an error")
