"""Settings of the HTTP server below the app."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

EVERY = "*"
"""CORS value for any origin, method or header."""


@dataclass(frozen=True)
class HttpOptions:
    """Settings of the HTTP server: addresses, TLS, keys, CORS, logging and shutdown."""

    host: str | None = None
    port: int = 8000
    uds: str | None = None
    api_key: tuple[str, ...] = ()
    allow_credentials: bool = False
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = (EVERY,)
    allowed_headers: tuple[str, ...] = (EVERY,)
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = int(ssl.CERT_NONE)
    ssl_ciphers: str | None = None
    enable_ssl_refresh: bool = False
    forwarded_allow_ips: tuple[str, ...] = ()
    """Proxies whose X-Forwarded-Proto and -For are trusted; none: FORWARDED_ALLOW_IPS, or 127.0.0.1 and ::1."""
    middleware: tuple[str, ...] = ()
    uvicorn_log_level: str = "info"
    disable_uvicorn_access_log: bool = False
    disable_access_log_for_endpoints: tuple[str, ...] = ()
    shutdown_timeout: float = 25.0
    """Seconds that running requests have after SIGTERM; below the 30 s after which Kubernetes kills by default."""
