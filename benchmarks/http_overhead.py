"""Time that HTTP adds to the engine for a picture: encoding, the server, and the client's reading and parsing.

    python -m benchmarks.http_overhead
    python -m benchmarks.http_overhead --picture text --size 2048x2048

The server runs in its own process. Its engine is real; its device is a fake that always makes the same picture. Each
round calls the engine, then the server in each way, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import httpx
from openai import OpenAI

from benchmarks.pictures import PICTURES, picture
from testbed.live_server import MODEL_NAME, live_server
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.omni import AsyncOmni

WARM_UPS = 2
ROUTE = "/v1/images/generations"
STEPS = 4


def serve(connection: Connection, kind: str, size: tuple[int, int]) -> None:
    """Serve until False is received; answer each True with the seconds of one run of the engine."""
    pixels = picture(kind, *size)

    async def seconds_of(omni: AsyncOmni) -> float:
        params = OmniDiffusionSamplingParams(height=size[0], width=size[1], num_inference_steps=STEPS, output_type="np")
        start = time.perf_counter()
        async for _ in omni.generate("x", params):
            pass
        return time.perf_counter() - start

    with live_server(image=lambda request, step: pixels) as server:
        connection.send(server.url)
        while connection.recv():
            connection.send(server.call(seconds_of, server.omni))


def ways(http: httpx.Client, sdk: OpenAI, size: tuple[int, int]) -> dict[str, Callable[[], int]]:
    """Name -> function that asks for one picture and returns the size of the response in bytes."""
    fields = {"prompt": "x", "size": f"{size[1]}x{size[0]}"}

    def post(**more: Any) -> int:
        response = http.post(ROUTE, json={**fields, "num_inference_steps": STEPS, **more})
        response.raise_for_status()
        return len(response.content)

    def by_sdk() -> int:
        answer = sdk.images.generate(
            model=MODEL_NAME, prompt="x", size=fields["size"], extra_body={"num_inference_steps": STEPS}
        )
        assert answer.data
        return len(answer.data[0].b64_json or "")

    return {
        "png, httpx": post,
        "png, openai SDK": by_sdk,
        "png, streamed": lambda: post(stream=True),
        "png, streamed with 3 previews": lambda: post(stream=True, partial_images=3),
        "jpeg 100": lambda: post(output_format="jpeg"),
        "webp 100": lambda: post(output_format="webp"),
    }


def measure(connection: Connection, size: tuple[int, int], rounds: int) -> None:
    """Print medians, and least values, which a busy machine changes less."""
    url = connection.recv()
    seconds: dict[str, list[float]] = defaultdict(list)
    num_bytes: dict[str, int] = {}
    with (
        httpx.Client(base_url=url, timeout=60) as http,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk,
    ):
        for number in range(WARM_UPS + rounds):
            connection.send(True)
            taken = {"engine": connection.recv()}
            for name, ask in ways(http, sdk, size).items():
                start = time.perf_counter()
                num_bytes[name] = ask()
                taken[name] = time.perf_counter() - start
            for name, value in taken.items() if number >= WARM_UPS else ():
                seconds[name].append(1e3 * value)
    engine = seconds.pop("engine")
    print(f"{'milliseconds over the engine':<32}{'median':>8}{'least':>8}{'MB':>8}")
    for name, values in seconds.items():
        median, least = (of(values) - of(engine) for of in (statistics.median, min))
        print(f"{name:<32}{median:>8.1f}{least:>8.1f}{num_bytes[name] / 1e6:>8.2f}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", choices=list(PICTURES), default="photograph")
    parser.add_argument("--size", default="1024x1024", help="width x height, multiples of 16")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args(argv)
    width, height = (int(side) for side in args.size.split("x"))
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve, args=(there, args.picture, (height, width)), daemon=True)
    process.start()
    there.close()
    try:
        measure(here, (height, width), args.rounds)
        here.send(False)
        process.join()
    finally:
        process.terminate()


if __name__ == "__main__":
    main()
