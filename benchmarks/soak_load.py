"""Clients of a soak: their requests and counts."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

GENERATIONS = "/v1/images/generations"
CHAT = "/v1/chat/completions"
PAUSE_SECONDS = 0.1
"""Pause of a client after a wrong response: a server that is gone refuses connections at once."""
Pictures = list[np.ndarray]
"""Pictures of a response, uint8 [height, width, 3] each."""


@dataclass(frozen=True)
class Case:
    """Request whose pictures were drawn before the load."""

    prompt: str
    size: str
    steps: int
    seed: int
    n: int = 1
    scale: float | None = None
    """Guidance scale, with an empty negative prompt; None: no guidance."""

    @property
    def body(self) -> dict[str, Any]:
        guidance = {} if self.scale is None else {"negative_prompt": "", "true_cfg_scale": self.scale}
        return {
            "prompt": self.prompt,
            "size": self.size,
            "num_inference_steps": self.steps,
            "seed": self.seed,
            "n": self.n,
            **guidance,
        }


CASES = (
    Case("red apple", "64x64", 4, seed=1),
    Case("a panda on a pink background", "96x64", 12, seed=2, scale=4.0),
    Case("pizza", "64x128", 6, seed=3, n=2),
    Case("rocket", "128x128", 20, seed=4, scale=3.0),
    Case("sunflower", "64x64", 40, seed=5),
    Case("a hamburger on a blue background", "96x96", 8, seed=6, n=3, scale=2.0),
)

_JSON = {"content-type": "application/json"}
BAD_REQUESTS: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    ("POST", GENERATIONS, {"content": b"{", "headers": _JSON}, 400),
    ("POST", GENERATIONS, {"json": {"prompt": 3}}, 400),
    ("POST", GENERATIONS, {"json": {"prompt": "x", "n": 11}}, 400),
    ("POST", GENERATIONS, {"json": {"prompt": "x", "size": "63x64"}}, 400),
    ("POST", GENERATIONS, {"json": {"prompt": "x", "num_inference_steps": 10**9}}, 400),
    ("POST", GENERATIONS, {"json": {"prompt": "x", "model": "nobody"}}, 404),
    ("POST", GENERATIONS, {"content": b'"' + b"x" * 2**21 + b'"', "headers": _JSON}, 413),
    ("POST", CHAT, {"json": {"messages": []}}, 400),
    ("POST", "/v1/images/edits", {"files": {"image": ("a.png", b"no picture")}, "data": {"prompt": "x"}}, 400),
    ("GET", "/v1/images/files/none", {}, 404),
    ("GET", GENERATIONS, {}, 405),
    ("GET", "/v1/nothing", {}, 404),
)
"""Bad requests: method, path, body and the expected status."""


class UnexpectedAnswerError(Exception):
    """A response that does not fit its request."""


@dataclass
class Tally:
    """Counts of all clients together."""

    answered: int = 0
    """Number of good requests that got their pictures."""
    pictures: int = 0
    """Number of pictures in those responses."""
    worst_psnr: float = float("inf")
    """Least PSNR, in dB, of a picture to the one drawn before the load."""
    seconds: list[float] = field(default_factory=list)
    """Latency of each good request."""
    left: int = 0
    """Pictures requested by clients that may have left before the response."""
    refused: Counter[int] = field(default_factory=Counter)
    """Number of bad requests that were refused as expected, by status."""
    faults: list[str] = field(default_factory=list)
    """Texts of wrong responses."""


async def plain(client: httpx.AsyncClient, case: Case) -> Pictures:
    answer = _checked(await client.post(GENERATIONS, json=case.body))
    return [_decoded(item["b64_json"]) for item in answer.json()["data"]]


async def by_url(client: httpx.AsyncClient, case: Case) -> Pictures:
    answer = _checked(await client.post(GENERATIONS, json={**case.body, "response_format": "url"}))
    files = [_checked(await client.get(item["url"])) for item in answer.json()["data"]]
    return [_pixels(file.content) for file in files]


async def in_chat(client: httpx.AsyncClient, case: Case) -> Pictures:
    body = {name: value for name, value in case.body.items() if name != "prompt"}
    messages = [{"role": "user", "content": case.prompt}]
    answer = _checked(await client.post(CHAT, json={**body, "messages": messages}))
    urls = [choice["message"]["images"][0]["image_url"]["url"] for choice in answer.json()["choices"]]
    return [_decoded(url.partition(",")[2]) for url in urls]


async def streamed(client: httpx.AsyncClient, case: Case) -> Pictures:
    """Pictures of a stream with previews; they arrive in any order."""
    pictures = {}
    async with client.stream("POST", GENERATIONS, json={**case.body, "stream": True, "partial_images": 1}) as answer:
        if answer.status_code != 200:
            await answer.aread()
        _checked(answer)
        async for line in answer.aiter_lines():
            event = json.loads(line[len("data: ") :]) if line.startswith("data: {") else {}
            if event.get("type") == "image_generation.completed":
                pictures[event["seed"]] = _decoded(event["b64_json"])
            elif "error" in event:
                raise UnexpectedAnswerError(f"a stream ends with {event['error']}")
    return [pictures[seed] for seed in sorted(pictures)]


Way = Callable[[httpx.AsyncClient, Case], Awaitable[Pictures]]
WAYS: tuple[Way, ...] = (plain, streamed, in_chat, by_url)
Calm = Mapping[Case, Pictures]


async def calm_pictures(client: httpx.AsyncClient, cases: Iterable[Case] = CASES) -> Calm:
    """Pictures of each case, drawn without other requests."""
    return {case: await plain(client, case) for case in cases}


async def ask_in_every_way(client: httpx.AsyncClient, calm: Calm, tally: Tally) -> None:
    """Send the cases of `calm` in all ways at once, each bad request, and one of a client that leaves."""
    await asyncio.gather(*(send_good(client, way, case, calm, tally) for way in WAYS for case in calm))
    for number in range(len(BAD_REQUESTS)):
        await send_bad(client, number, tally)
    await leave(client, [*calm][-1], 0.05, tally)


async def play_client(
    client: httpx.AsyncClient, rng: random.Random, calm: Calm, tally: Tally, over: asyncio.Event
) -> None:
    """Send one request after another until the end; seven of ten are good."""
    while not over.is_set():
        kind, case = rng.random(), rng.choice([*calm])
        if kind < 0.7:
            await send_good(client, rng.choice(WAYS), case, calm, tally)
        elif kind < 0.85:
            await leave(client, case, rng.random(), tally)
        else:
            await send_bad(client, rng.randrange(len(BAD_REQUESTS)), tally)


async def send_good(client: httpx.AsyncClient, way: Way, case: Case, calm: Calm, tally: Tally) -> None:
    start = time.monotonic()
    try:
        pictures = await way(client, case)
    except (httpx.HTTPError, UnexpectedAnswerError, KeyError, ValueError) as error:
        tally.faults.append(f"{way.__name__} {case}: {type(error).__name__}: {error}")
        await asyncio.sleep(PAUSE_SECONDS)
        return
    tally.seconds.append(time.monotonic() - start)
    tally.answered += 1
    tally.pictures += len(pictures)
    wanted = calm[case]
    if [picture.shape for picture in pictures] != [picture.shape for picture in wanted]:
        tally.faults.append(f"{way.__name__} {case}: {len(pictures)} pictures of other sizes")
        return
    tally.worst_psnr = min(tally.worst_psnr, *(psnr(a, b) for a, b in zip(pictures, wanted)))


async def leave(client: httpx.AsyncClient, case: Case, seconds: float, tally: Tally) -> None:
    """Ask for pictures, then disconnect after some seconds."""
    tally.left += case.n
    try:
        _checked(await asyncio.wait_for(client.post(GENERATIONS, json=case.body), seconds))
    except TimeoutError:
        return
    except (httpx.HTTPError, UnexpectedAnswerError) as error:
        tally.faults.append(f"a client that left, {case}: {type(error).__name__}: {error}")


async def send_bad(client: httpx.AsyncClient, number: int, tally: Tally) -> None:
    method, path, body, status = BAD_REQUESTS[number]
    try:
        answer = await client.request(method, path, **body)
        if answer.status_code != status or not answer.json()["error"]["message"]:
            raise UnexpectedAnswerError(f"{answer.status_code} {answer.text[:200]}")
    except (httpx.HTTPError, UnexpectedAnswerError, KeyError, ValueError) as error:
        tally.faults.append(f"bad request {number}, {method} {path}: {type(error).__name__}: {error}")
        return
    tally.refused[status] += 1


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB of two uint8 pictures of the same shape; infinite if equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.status_code != 200:
        raise UnexpectedAnswerError(f"{answer.status_code} {answer.text[:200]}")
    return answer


def _decoded(text: str) -> np.ndarray:
    return _pixels(base64.b64decode(text))


def _pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
