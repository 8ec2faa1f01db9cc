"""A server process on a fake worker, with places that hang when they are asked to.

`python -m tests.entrypoints.cli.fake_server SOCKET SHUTDOWN_TIMEOUT STOP_SECONDS`
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from fastapi import Request
from starlette.responses import Response

from testbed.live_server import FAKE_INFO, FakeDevice, FakeImageInput
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.entrypoints.cli import serve
from vllm_omni.entrypoints.cli.args import ServeArgs
from vllm_omni.entrypoints.openai.responses import encoding
from vllm_omni.entrypoints.openai.settings import HttpOptions, ServerSettings
from vllm_omni.entrypoints.server.signals import StopSignals
from vllm_omni.inputs.images import ReaderSizes
from vllm_omni.logs import QueuedStreams, fill_standard_descriptors

FAR_HOST = "hangs.example"


def hang(*place: Any) -> Any:
    """Never return."""
    print(f"hanging in {place[-1]}", flush=True)
    threading.Event().wait()


async def hanging_paths(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """A user's middleware."""
    if request.url.path == "/hang/thread":
        await asyncio.to_thread(hang, "thread")
    elif request.url.path == "/hang/loop":
        hang("loop")
    return await call_next(request)


@dataclass(frozen=True)
class HangingImageInput(FakeImageInput):
    def sizes(self, width: int, height: int) -> ReaderSizes:
        hang("decode")
        raise AssertionError


def count_prompt_tokens(prompt: str) -> int:
    if prompt == "resolve":
        hang("resolve")
    return len(prompt.split())


def look_up(host: str, *args: Any, **kwargs: Any) -> Any:
    return hang("fetch") if host == FAR_HOST else system_look_up(host, *args, **kwargs)


system_look_up = socket.getaddrinfo


def main(path: str, shutdown_timeout: str, stop_seconds: str) -> None:
    """`stop_seconds`: bound of each part of stopping."""
    fill_standard_descriptors()
    info = replace(FAKE_INFO, image_input=HangingImageInput(min_images=0), count_prompt_tokens=count_prompt_tokens)
    seconds = float(stop_seconds)
    limits = serve.StopLimits(close_seconds=seconds, http_seconds=seconds, log_seconds=seconds)
    args = ServeArgs(
        OmniDiffusionConfig(model="fake"),
        ServerSettings(served_model_names=("fake",), allowed_media_domains=(FAR_HOST,)),
        HttpOptions(uds=path, shutdown_timeout=float(shutdown_timeout), middleware=(f"{__name__}.hanging_paths",)),
    )
    streams = QueuedStreams()
    with (
        StopSignals(streams.leave) as signals,
        patch("vllm_omni.omni.load_model_info", lambda *_: info),
        patch("vllm_omni.omni.check_model_files"),
        patch("vllm_omni.omni.make_executor", lambda *_: FakeDevice()),
        patch.object(encoding, "encode", lambda *_: hang("encode")),
        patch.object(socket, "getaddrinfo", look_up),
    ):
        streams.install()
        streams.leave(serve.serve(args, signals, streams, limits=limits))


if __name__ == "__main__":
    # By its full name, for the middleware's import path.
    from tests.entrypoints.cli import fake_server

    fake_server.main(*sys.argv[1:])
