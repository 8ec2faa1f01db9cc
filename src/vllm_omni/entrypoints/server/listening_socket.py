"""The TCP or Unix socket on which the server listens."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import AbstractContextManager

from vllm_omni.entrypoints.openai.settings import HttpOptions
from vllm_omni.errors import ConfigError

BACKLOG = 2048


class ListeningSocket(AbstractContextManager["ListeningSocket"]):
    """A listening TCP or Unix socket; leaving the context closes it and removes the file of a Unix socket.

    Raises ConfigError if the address cannot be used.
    """

    def __init__(self, http: HttpOptions) -> None:
        self._uds = http.uds
        self.socket = _bind_unix(http.uds) if http.uds else _bind_tcp(http.host, http.port)
        # From here on a client waits to be accepted instead of being refused, so the address may be logged.
        self.socket.listen(BACKLOG)
        scheme = "https" if http.ssl_certfile else "http"
        self.address = f"unix:{http.uds}" if http.uds else _url(scheme, *self.socket.getsockname()[:2])

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket. A second call does nothing."""
        self.socket.close()
        if self._uds and os.path.exists(self._uds):
            os.unlink(self._uds)


def _bind_tcp(host: str | None, port: int) -> socket.socket:
    try:
        # No host means every IPv4 address, as in vLLM.
        family, kind, _, _, address = socket.getaddrinfo(
            host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"--host takes an address of this machine, got {host!r}: {error.strerror}") from error
    sock = socket.socket(family, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        flags = f"--host {host} --port {port}" if host else f"--port {port}"
        raise ConfigError(f"{flags}: cannot listen there: {error.strerror}") from error
    return sock


def _bind_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_stale(path):
            os.unlink(path)
        sock.bind(path)
    except OSError as error:
        sock.close()
        raise ConfigError(f"--uds {path}: cannot listen there: {error.strerror or error}") from error
    return sock


def _is_stale(path: str) -> bool:
    """Whether `path` is a socket that no process listens on: a killed server left it behind."""
    if not os.path.exists(path) or not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED


def _url(scheme: str, host: str, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
