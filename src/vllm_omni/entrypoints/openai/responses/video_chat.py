"""Answers of `/v1/chat/completions` with videos: each in a data URL, or behind a link if it is large."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from vllm_omni.entrypoints.openai.responses.answers import frame_around, identifier_fields, json_with_list
from vllm_omni.entrypoints.openai.responses.chat import (
    DONE,
    URL_PLACEHOLDER,
    ChatEnvelope,
    as_json,
    chat_usage,
    choice,
    event,
    media_message,
)
from vllm_omni.entrypoints.openai.responses.encoding import base64_between
from vllm_omni.jobs import OutputStream
from vllm_omni.outputs import OmniRequestOutput

if TYPE_CHECKING:  # its module imports encoders of videos
    from vllm_omni.video_jobs.encoding import EncodedVideo

MAX_DATA_URL_BYTES = 20_000_000
"""Most bytes of a video in a data URL; a larger one is kept as the file of a job."""
Encode = Callable[[OutputStream], AsyncGenerator[tuple[OmniRequestOutput, "EncodedVideo | None"], None]]


@dataclass(frozen=True)
class VideoChatAnswer:
    """An `Answer` in the form of OpenAI's chat API, whose choices are videos."""

    envelope: ChatEnvelope
    safety_identifier: str | None
    ignored_fields: tuple[str, ...]
    encode: Encode
    """See `VideoJobs.encode`."""
    keep: Callable[[int, EncodedVideo], Awaitable[str]]
    """Keeps the file of video `index`, and returns its URL."""

    async def response(self, outputs: OutputStream) -> Response:
        choices: dict[int, bytes] = {}
        async with aclosing(self.encode(outputs)) as videos:
            async for output, encoded in videos:
                if encoded is None:
                    fields = self.envelope.completion(chat_usage(output)) | {"timings": output.timings}
                    fields |= identifier_fields(self.safety_identifier) | {"ignored_fields": self.ignored_fields}
                    return json_with_list(fields, "choices", [choices[index] for index in sorted(choices)])
                value = choice(output.index, output.seeds[0], "video")
                choices[output.index] = await self._with_url(value, output, encoded)
        raise AssertionError("the outputs of a request end with its result or an error")

    async def events(self, outputs: OutputStream) -> AsyncGenerator[bytes, None]:
        """Two chunks for each finished video, as for pictures; the video is in `delta.videos`."""
        ignored = {"ignored_fields": self.ignored_fields}
        async with aclosing(self.encode(outputs)) as videos:
            async for output, encoded in videos:
                if encoded is None:
                    if self.envelope.include_usage:
                        usage = {"usage": chat_usage(output).model_dump()}
                        yield event(self.envelope.chunk() | usage | ignored)
                    yield DONE
                    return
                chunk = self.envelope.output_chunk(output, media_message("video"), None)
                yield await self._with_url(chunk, output, encoded, frame_around())
                yield event(self.envelope.output_chunk(output, {}, "stop") | ignored)

    async def _with_url(
        self,
        value: dict[str, Any],
        output: OmniRequestOutput,
        encoded: EncodedVideo,
        around: tuple[bytes, bytes] = (b"", b""),
    ) -> bytes:
        """`value` as JSON between `around`, with the URL of a video; the video's files are removed."""
        before, _, after = as_json(value).rpartition(URL_PLACEHOLDER)
        before, after = around[0] + before, after + around[1]
        try:
            size = await asyncio.to_thread(lambda: encoded.video.stat().st_size)
            if size > MAX_DATA_URL_BYTES:
                url = await self.keep(output.index, encoded)
                return before + json.dumps(url)[1:-1].encode() + after
            before += b"data:%s;base64," % encoded.content_type.encode()
            return await asyncio.to_thread(lambda: base64_between(before, encoded.video.read_bytes(), after))
        finally:
            await asyncio.to_thread(encoded.remove)
