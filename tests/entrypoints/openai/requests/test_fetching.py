"""Pictures by URL: fetched only from allowed hosts, at public addresses, within limits."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import resource
import ssl
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography import x509
from hypothesis import example, given, settings
from hypothesis import strategies as st

from testbed.live_server import FAKE_EDIT_INFO, PATIENT_FETCH_POLICY, LiveServer, live_server
from testbed.patience import GUARD_SECONDS, until
from testbed.tiny_models import photo
from tests.entrypoints.cli.test_serve import self_signed
from tests.entrypoints.openai.far_server import FarServer, far_server
from tests.entrypoints.openai.routes.test_image_edits import EDITS, data_url, file_of, newest
from tests.entrypoints.openai.routes.test_image_errors import error_of
from vllm_omni.entrypoints.openai.requests.fetching import FetchPolicy, IPAddress, MediaFetcher, is_public
from vllm_omni.entrypoints.openai.requests.input_pictures import MAX_IMAGE_BYTES
from vllm_omni.errors import InvalidRequestError, QueueFullError

CHAT = "/v1/chat/completions"
PHOTO, OTHER = photo(40, 30, 1), photo(24, 20, 2)
FILES = {"photo.png": file_of(PHOTO), "other": file_of(OTHER, "WEBP", lossless=True), "text": b"no picture"}
DOMAINS = ("photos.example", "mirror.example", "inside.example")
NAMES = {
    "photos.example": ["127.0.0.1"],
    "mirror.example": ["127.0.0.1"],
    "inside.example": ["127.0.0.1", "10.0.0.1"],
}


def here_or_public(address: IPAddress) -> bool:
    return address == ipaddress.ip_address("127.0.0.1") or is_public(address)


POLICY = replace(PATIENT_FETCH_POLICY, resolve=NAMES.__getitem__, allows_address=here_or_public)


@pytest.fixture(scope="module")
def far() -> Iterator[FarServer]:
    with far_server(FILES) as running:
        yield running


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    settings = {"allowed_media_domains": DOMAINS}
    with live_server(info=FAKE_EDIT_INFO, settings=settings, fetch_policy=POLICY) as running:
        yield running


def edit(*urls: str) -> dict[str, Any]:
    return {"prompt": "x", "images": [{"image_url": url} for url in urls]}


def chat(*urls: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, *parts]}]}


async def fetch(url: str, policy: FetchPolicy = POLICY, max_bytes: int = 2**20) -> bytes:
    fetcher = MediaFetcher(DOMAINS, max_bytes, policy)
    try:
        return bytes(await fetcher.fetch(url, lambda _: None))
    finally:
        await fetcher.close()


@pytest.mark.parametrize(("path", "body"), [(EDITS, edit), (CHAT, chat)], ids=["edits", "chat"])
def test_pictures_by_url(server: LiveServer, http: httpx.Client, far: FarServer, path: str, body: Any) -> None:
    urls = [far.url("/files/photo.png"), data_url(PHOTO), far.url("/files/other?size=1#top", "mirror.example")]
    response = http.post(path, json=body(*urls))
    assert response.status_code == 200, response.text
    for image, expected in zip(newest(server), (PHOTO, PHOTO, OTHER), strict=True):
        np.testing.assert_array_equal(image.condition, np.asarray(expected))
    assert server.app.state.upload_budget.num_bytes == 0


def test_redirects_within_the_allowed_hosts(server: LiveServer, http: httpx.Client, far: FarServer) -> None:
    url = far.url(f"/to//to/{far.url('/files/other', 'mirror.example').replace('/', '%252F')}")
    response = http.post(EDITS, json=edit(url))
    assert response.status_code == 200, response.text
    np.testing.assert_array_equal(newest(server)[0].condition, np.asarray(OTHER))


REFUSED = [
    # path under photos.example, what the message says
    ("/files/nothing.png", "photos.example answered 404"),
    ("/to/http:%2F%2Fevil.example%2Fa.png", "photos.example redirects to what is no URL of photos.example, mirror"),
    ("/to/http:%2F%2F127.0.0.1%2Fa.png", "photos.example redirects to what is no URL"),
    ("/to/file:%2F%2F%2Fetc%2Fpasswd", "photos.example redirects to what is no URL"),
    ("/to/http:%2F%2Fxn--zzzzzz99999%2Fa.png", "photos.example redirects to what is no URL"),
    ("/to/http:%2F%2Fa:b@mirror.example%2Fa.png", "photos.example redirects to what is no URL"),
    ("/to/http:%2F%2Finside.example%2Fa.png", "inside.example is not at a public address"),
    ("/loop/0", "redirects more than 3 times"),
    ("/gzip/", "compressed, as 'gzip'"),
    ("/claims/99999999999", f"more than {MAX_IMAGE_BYTES} bytes"),
    ("/headers/", "could not be reached, or broke off"),
    ("/to/:http:%2F%2F%5D", "photos.example redirects to what is no URL"),
    ("/to/http:%2F%2F%5B::1", "photos.example redirects to what is no URL"),
    ("/to/http:%2F%2Fphotos.example:99999%2F", "photos.example redirects to what is no URL"),
    ("/to/%2F%25ff%00", "photos.example"),
    ("/to/" + "a" * 60_000, "photos.example"),
    ("/nowhere/", "photos.example answered 302"),
    ("/claims/x", "could not be reached, or broke off"),
    ("/claims/-1", "could not be reached, or broke off"),
    ("/claims/" + "9" * 5000, "could not be reached, or broke off"),
    ("/many/", "could not be reached, or broke off"),
    ("/cut/", "could not be reached, or broke off"),
]


@pytest.mark.parametrize("start", ["", "http://", "http://photos.example/", "https://photos.example:", "//", ":"])
def test_whatever_is_no_url_is_refused(start: str) -> None:
    """A refused URL, in a request and as a redirect, is not resolved."""
    asked: list[str] = []

    def resolve(host: str) -> list[str]:
        asked.append(host)
        raise UnicodeError("label too long")  # from the system's own codec

    fetcher = MediaFetcher(DOMAINS, 2**20, replace(POLICY, resolve=resolve, tls=False))

    @settings(max_examples=150, deadline=None, database=None)
    @example("\ud800")
    @example("\xad.example")
    @example("x" * 70_000)
    @example("[::1")
    @example("http://]")
    @given(st.text(st.characters(), max_size=40))
    def check(text: str) -> None:
        with pytest.raises(InvalidRequestError, match=r"^image_url "):
            runner.run(fetcher.fetch(start + text, lambda _: None))
        with suppress(InvalidRequestError):
            fetcher._redirected(httpx.URL("http://photos.example/"), start + text)

    with asyncio.Runner() as runner:
        check()
        runner.run(fetcher.close())
    assert set(asked) <= {"photos.example"}


@pytest.mark.parametrize(("path", "says"), REFUSED, ids=[path for path, _ in REFUSED])
def test_what_cannot_be_fetched_is_the_senders_400(
    server: LiveServer, http: httpx.Client, far: FarServer, path: str, says: str
) -> None:
    response = http.post(EDITS, json=edit(far.url(path)))
    assert (response.status_code, error_of(response)["param"]) == (400, "image_url")
    message = response.json()["error"]["message"]
    assert message.startswith("image_url cannot be fetched: ")
    assert says in message
    assert "\n" not in message
    assert not any(address in message for address in ("10.0.0.1", "127.0.0.1", "evil.example"))
    assert server.app.state.upload_budget.num_bytes == 0
    in_chat = http.post(CHAT, json=chat(far.url(path)))
    assert (in_chat.status_code, in_chat.json()["error"]["message"]) == (400, message)


@pytest.mark.parametrize(
    ("url", "got"),
    [
        ("http://evil.example/a.png", "the host 'evil.example'"),
        ("http://photos.example.evil.example/a.png", "the host"),
        ("http://evil.example\\@photos.example@evil.example/", "without a user name"),
        ("http://sub.photos.example/a.png", "the host 'sub.photos.example'"),
        ("http://photos.example./a.png", "the host 'photos.example.'"),
        ("http://127.0.0.1/a.png", "the host '127.0.0.1'"),
        ("http://2130706433/a.png", "the host '2130706433'"),
        ("http://me:secret@photos.example/a.png", "without a user name"),
        ("http://photos.example:0/a.png", "'http://photos.example:0/a.png'"),
        ("http://photos.example:65536/a.png", "'http://photos.example:65536"),
        ("http:///a.png", "the host ''"),
        ("http://xn--zzzzzz99999/a.png", "the host 'xn--zzzzzz99999'"),
        ("http://photos.example/\n", "'http://photos.example/"),
        ("http://[::1/", "'http://[::1/'"),
        ("ftp://photos.example/a.png", "'ftp://photos.example/a.png'"),
        ("file:///etc/passwd", "'file:///etc/passwd'"),
        ("//photos.example/a.png", "'//photos.example/a.png'"),
        ("DATA:image/png;base64,aGVsbG8=", "'DATA:"),
        ("", "''"),
    ],
)
def test_urls_that_are_not_allowed(http: httpx.Client, url: str, got: str) -> None:
    response = http.post(EDITS, json=edit(url))
    assert (response.status_code, error_of(response)["param"]) == (400, "image_url")
    message = response.json()["error"]["message"]
    assert "takes data: URLs, and http and https URLs of photos.example, mirror.example" in message
    assert got in message
    assert "secret" not in message


def test_the_file_decides_what_it_is(http: httpx.Client, far: FarServer) -> None:
    response = http.post(EDITS, json=edit(far.url("/files/text")))
    assert (response.status_code, error_of(response)["param"]) == (400, "image")
    assert "PNG, JPEG and WebP" in response.json()["error"]["message"]


def test_what_is_too_large_is_counted_while_it_streams(server: LiveServer, http: httpx.Client, far: FarServer) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    response = http.post(EDITS, json=edit(far.url("/endless/")))
    assert response.status_code == 400
    assert f"more than {MAX_IMAGE_BYTES} bytes" in response.json()["error"]["message"]
    assert far.num_sent < MAX_IMAGE_BYTES + 2**24, "what the sockets' buffers hold is sent and not read"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10
    assert server.app.state.upload_budget.num_bytes == 0


def test_a_full_server_says_so(server: LiveServer, http: httpx.Client, far: FarServer) -> None:
    budget = server.app.state.upload_budget
    most, budget.max_bytes = budget.max_bytes, 1000
    try:
        response = http.post(EDITS, json=edit(far.url("/files/photo.png")))
    finally:
        budget.max_bytes = most
    assert response.status_code == 429
    assert budget.num_bytes == 0


@pytest.mark.parametrize(("path", "body"), [(EDITS, edit), (CHAT, chat)], ids=["edits", "chat"])
def test_a_client_that_leaves_ends_the_fetch(server: LiveServer, far: FarServer, path: str, body: Any) -> None:
    far.left.clear()
    num_before = len(far.requests)
    connection = HTTPConnection(server.url.removeprefix("http://"))
    connection.request("POST", path, json.dumps(body(far.url("/silent/"))), {"content-type": "application/json"})
    server.wait_until(lambda: len(far.requests) > num_before)
    assert server.app.state.upload_budget.num_bytes > 0
    connection.close()
    assert far.left.wait(GUARD_SECONDS)
    server.wait_until(lambda: server.app.state.upload_budget.num_bytes == 0)


@pytest.mark.parametrize(
    ("path", "limit"),
    [("/silent/", "read_seconds"), ("/silent/", "total_seconds"), ("/drip/", "total_seconds")],
    ids=["silence", "total", "total, bit by bit"],
)
async def test_deadlines(far: FarServer, path: str, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock jumps ahead once the far server has the request; /drip/ is never silent for long."""
    far.left.clear()
    seconds: dict[str, Any] = {limit: 10.0}
    num_before, loop, ahead = len(far.requests), asyncio.get_running_loop(), 0.0
    time = loop.time
    monkeypatch.setattr(loop, "time", lambda: time() + ahead)
    fetching = asyncio.create_task(fetch(far.url(path), replace(POLICY, **seconds)))
    await until(lambda: len(far.requests) > num_before)
    while not fetching.done():
        ahead += 1.0
        await asyncio.sleep(0)
    with pytest.raises(InvalidRequestError, match=r"photos\.example did not send the picture in time"):
        await fetching
    assert far.left.wait(GUARD_SECONDS)


async def test_a_name_is_resolved_once_and_its_addresses_are_tried_in_turn(far: FarServer) -> None:
    answers = iter([["127.0.0.2", "127.0.0.1"], ["10.0.0.1"]])  # a second question would get another answer
    policy = FetchPolicy(lambda _: next(answers), lambda address: address.is_loopback)
    num_before = len(far.requests)
    assert await fetch(far.url("/files/photo.png"), policy) == FILES["photo.png"]
    ((_, headers),) = far.requests[num_before:]
    assert headers["host"] == f"photos.example:{far.port}"


async def test_a_name_is_resolved_as_it_was_allowed(far: FarServer) -> None:
    """xn--strae-oqa is a name with the letter ß, which a resolver would replace by ss: another host."""
    name = "xn--strae-oqa.example"
    fetcher = MediaFetcher([name], 2**20, replace(POLICY, resolve={name: ["127.0.0.1"]}.__getitem__))
    try:
        data = await fetcher.fetch(far.url("/files/photo.png", name), lambda _: None)
    finally:
        await fetcher.close()
    assert data == FILES["photo.png"]


async def test_nothing_is_taken_from_the_environment_or_from_earlier_answers(
    far: FarServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    fetcher = MediaFetcher(DOMAINS, 2**20, POLICY)
    for _ in range(2):
        await fetcher.fetch(far.url("/files/photo.png"), lambda _: None)
    await fetcher.close()
    assert set(far.requests[-1][1]) == {"host", "accept-encoding", "user-agent"}
    assert far.requests[-1][1]["accept-encoding"] == "identity"


async def test_a_name_without_an_address() -> None:
    def unknown(_: str) -> list[str]:
        raise OSError(-2, "Name or service not known")

    resolvers: list[Callable[[str], list[str]]] = [unknown, lambda _: []]
    for resolver in resolvers:
        with pytest.raises(InvalidRequestError, match=r"photos\.example (could not be reached|has no address)"):
            await fetch("http://photos.example/", FetchPolicy(resolver, is_public))


async def test_certificates_are_checked_for_the_name(tmp_path: Path) -> None:
    """The name is checked even after another name at the same address had a valid certificate."""
    key, certificate = self_signed(tmp_path, x509.DNSName("photos.example"))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    trusting = ssl.create_default_context(cafile=str(certificate))
    fetcher = MediaFetcher(DOMAINS, 2**20, replace(POLICY, tls=trusting))
    with far_server(FILES, tls) as far:
        url = far.url("/files/photo.png", "photos.example", "https")
        assert await fetcher.fetch(url, lambda _: None) == FILES["photo.png"]
        with pytest.raises(InvalidRequestError, match=r"mirror\.example could not be reached"):
            await fetcher.fetch(far.url("/files/photo.png", "mirror.example", "https"), lambda _: None)
        with pytest.raises(InvalidRequestError, match=r"photos\.example could not be reached"):
            await fetch(url)  # nobody vouches for it
        await fetcher.close()


async def test_no_more_than_so_many_at_a_time(far: FarServer) -> None:
    fetcher = MediaFetcher(DOMAINS, 2**20, replace(POLICY, max_fetches=1))
    waiting = asyncio.create_task(fetcher.fetch(far.url("/silent/"), lambda _: None))
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="1 pictures are being fetched"):
        await fetcher.fetch(far.url("/files/photo.png"), lambda _: None)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert await fetcher.fetch(far.url("/files/photo.png"), lambda _: None) == FILES["photo.png"]
    await fetcher.close()


NOT_PUBLIC = [
    *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254"),
    *(
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "192.88.99.1",
        "198.18.0.1",
        "192.0.2.1",
        "224.0.0.1",
        "239.1.1.1",
    ),
    *("240.0.0.1", "255.255.255.255", "::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "fc00::1"),
    *("fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "2001:db8::1", "2002:7f00:1::", "2001::1"),
    *("64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b:1::1", "100::1", "3fff::1"),
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
@pytest.mark.parametrize("company", [[], ["93.184.215.14"]], ids=["alone", "behind a public one"])
async def test_an_allowed_name_at_an_address_that_is_not_public(address: str, company: list[str]) -> None:
    """The default rule of a server is `is_public`."""
    policy = FetchPolicy(resolve=lambda _: [*company, address])
    with pytest.raises(InvalidRequestError, match=r"photos\.example is not at a public address$") as caught:
        await fetch("https://photos.example/a.png", policy)
    assert address not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_a_server_connects_to_no_machine_of_its_own(far: FarServer) -> None:
    """With the system's resolver and the default rule, as `vllm serve` starts it."""
    num_before = len(far.requests)
    settings = {"allowed_media_domains": ("localhost", "127.0.0.1")}
    with live_server(info=FAKE_EDIT_INFO, settings=settings) as running:
        for host in settings["allowed_media_domains"]:
            response = httpx.post(f"{running.url}{EDITS}", json=edit(far.url("/files/photo.png", host)))
            assert response.status_code == 400
            assert f"{host} is not at a public address" in response.json()["error"]["message"]
    assert len(far.requests) == num_before
