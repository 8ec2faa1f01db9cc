"""Download of pictures that a request names by URL, from the allowed hosts only."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass

import httpx

from vllm_omni.errors import InvalidRequestError, QueueFullError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_RESOLVING_THREADS = 4
_MAX_QUOTE = 40
# Raised for an invalid URL by httpx, and by the codecs that it calls (UnicodeError is a ValueError).
_URL_ERRORS = (httpx.InvalidURL, ValueError)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "168.63.129.16/32",  # Azure: the host of a virtual machine, at an address that looks public
            "192.0.0.0/24",  # protocols, and Oracle's metadata; like the next ones, public to some versions of Python
            "192.88.99.0/24",  # relays of 6to4
            "2001::/23",  # protocols, Teredo among them, which wraps IPv4 addresses
            "2002::/16",  # 6to4 wraps them as well
            "3fff::/20",  # documentation
        ),
    )
)


def is_public(address: IPAddress) -> bool:
    """Whether `address` is on the public internet: not private, local, reserved or multicast.

    An IPv6 address that contains an IPv4 address (mapped, or translated by NAT64) is as public as the IPv4 address.
    """
    if isinstance(address, ipaddress.IPv6Address):
        embedded = address.ipv4_mapped
        if address in _NAT64:
            embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if embedded is None and address not in _GLOBAL_UNICAST:
            return False
        address = embedded or address
    if any(address in network for network in _NOT_PUBLIC):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def resolve_host(host: str) -> list[str]:
    """Addresses of a host name from the system's resolver. Blocks. Raises OSError."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


@dataclass(frozen=True)
class FetchPolicy:
    """Rules and time limits of downloads. The server uses the defaults; tests use other values."""

    resolve: Callable[[str], Sequence[str]] = resolve_host
    allows_address: Callable[[IPAddress], bool] = is_public
    """Called with every address of a host; the host is refused if one address is not allowed."""
    tls: ssl.SSLContext | bool = True
    """True: certificates are verified with the usual authorities."""
    connect_seconds: float = 5.0
    read_seconds: float = 10.0
    """Longest time without a byte."""
    total_seconds: float = 30.0
    """Longest time for a picture, including redirects."""
    max_redirects: int = 3
    max_fetches: int = 64
    """Downloads at the same time, so that clients cannot make this server flood another one."""


class MediaFetcher:
    """Downloads files by `http` and `https` from `allowed_domains`: exact host names in lower case.

    A name is resolved once, all its addresses are checked, and the connection goes to one of them, so a second answer
    of the name server changes nothing; TLS checks the certificate for the name. Every redirect is checked in the same
    way. The bare transport follows no redirect by itself, and has no cookies and no proxies.
    """

    def __init__(self, allowed_domains: Sequence[str], max_bytes: int, policy: FetchPolicy) -> None:
        self._domains = frozenset(allowed_domains)
        self._accepted = ", ".join(allowed_domains)
        self._max_bytes = max_bytes
        self._policy = policy
        self._num_fetches = 0
        self._transport = httpx.AsyncHTTPTransport(
            verify=policy.tls, trust_env=False, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
        )
        # Not asyncio's threads: a name server that does not answer must not delay their other work.
        self._threads = ThreadPoolExecutor(_RESOLVING_THREADS, thread_name_prefix="omni-resolve-host")

    async def fetch(self, url: str, hold: Callable[[int], None]) -> bytearray:
        """Download the file at `url`. `hold` is called with the size of each piece before it is kept, and may raise.

        Raises InvalidRequestError for a URL that is not allowed, and if the host does not send a file of at most
        `max_bytes` in time; QueueFullError if too many downloads are under way.
        """
        start = self._checked(url)
        if self._num_fetches >= self._policy.max_fetches:
            raise QueueFullError(f"{self._num_fetches} pictures are being fetched", retry_after=1.0)
        self._num_fetches += 1
        try:
            async with asyncio.timeout(self._policy.total_seconds):
                return await self._follow(start, hold)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise _failed(f"{_host(start)} did not send the picture in time") from error
        except InvalidRequestError:  # is a ValueError
            raise
        except (*_URL_ERRORS, httpx.RequestError, OSError) as error:
            raise _failed(f"{_host(start)} could not be reached, or broke off") from error
        finally:
            self._num_fetches -= 1

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._transport.aclose()

    def _checked(self, text: str) -> httpx.URL:
        given = repr(text[:_MAX_QUOTE])
        if not self._domains:
            raise _refused(f"takes data: URLs, this server fetches none from elsewhere; got {given}")
        takes = f"takes data: URLs, and http and https URLs of {self._accepted}"
        try:
            url = httpx.URL(text)
        except _URL_ERRORS as error:
            raise _refused(f"{takes}; got {given}") from error
        if url.scheme not in ("http", "https") or not (url.port is None or 0 < url.port < 2**16):
            raise _refused(f"{takes}; got {given}")
        if url.userinfo:
            raise _refused(f"{takes}, without a user name and a password")
        if _host(url) not in self._domains:
            raise _refused(f"{takes}; got the host {_host(url)[:_MAX_QUOTE]!r}")
        return url

    async def _follow(self, url: httpx.URL, hold: Callable[[int], None]) -> bytearray:
        for _ in range(self._policy.max_redirects + 1):
            async with aclosing(await self._get(url)) as response:
                if not response.has_redirect_location:
                    return await self._read(_host(url), response, hold)
                url = self._redirected(url, response.headers["location"])
        raise _failed(f"{_host(url)} redirects more than {self._policy.max_redirects} times")

    def _redirected(self, url: httpx.URL, location: str) -> httpx.URL:
        try:
            return self._checked(str(url.join(location)))
        except _URL_ERRORS as error:  # the client must not learn the target
            raise _failed(f"{_host(url)} redirects to what is no URL of {self._accepted}") from error

    async def _get(self, url: httpx.URL) -> httpx.Response:
        """Response of the first of the host's addresses that accepts a connection; its body is not read yet."""
        policy = self._policy
        timeout = httpx.Timeout(policy.read_seconds, connect=policy.connect_seconds, pool=None)
        failure: httpx.TransportError | None = None
        for address in await self._addresses(_host(url)):
            request = httpx.Request(
                "GET",
                url.copy_with(host=address),
                headers={"host": url.netloc.decode(), "accept-encoding": "identity", "user-agent": "vllm-omni"},
                extensions={"timeout": timeout.as_dict(), "sni_hostname": _host(url)},
            )
            try:
                return await self._transport.handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure or _failed(f"{_host(url)} has no address")

    async def _addresses(self, host: str) -> list[str]:
        loop = asyncio.get_running_loop()
        addresses = list(await loop.run_in_executor(self._threads, self._policy.resolve, host))
        if not all(self._policy.allows_address(ipaddress.ip_address(address)) for address in addresses):
            raise _failed(f"{host} is not at a public address")
        return addresses

    async def _read(self, host: str, response: httpx.Response, hold: Callable[[int], None]) -> bytearray:
        if response.status_code != 200:
            raise _failed(f"{host} answered {response.status_code}")
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":  # a few compressed bytes can become very many
            raise _failed(f"{host} sent the picture compressed, as {encoding[:_MAX_QUOTE]!r}")
        too_large = _failed(f"{host} sent a picture of more than {self._max_bytes} bytes")
        declared = response.headers.get("content-length", "0")
        if not declared.isdecimal():
            raise _failed(f"{host} sent the content-length {declared[:_MAX_QUOTE]!r}")
        if int(declared) > self._max_bytes:
            raise too_large
        data = bytearray()
        async for chunk in response.aiter_raw():
            if len(data) + len(chunk) > self._max_bytes:
                raise too_large
            hold(len(chunk))
            data += chunk
        return data


def _host(url: httpx.URL) -> str:
    """Host name of `url` in ASCII, as in `allowed_domains`.

    httpx decodes `xn--` names; for some that fails, and for some encoding the result again gives another name.
    """
    return url.raw_host.decode()


def _refused(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"image_url {reason}", param="image_url")


def _failed(reason: str) -> InvalidRequestError:
    return _refused(f"cannot be fetched: {reason}")
