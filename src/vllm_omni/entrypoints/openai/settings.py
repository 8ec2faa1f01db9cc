"""Settings of the HTTP server, besides the engine's config."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ResponseFormat = Literal["b64_json", "url"]
ChatTextTasks = Literal["empty", "generate"]
EVERY = "*"
"""CORS value for any origin, method or header."""


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the HTTP server. The parser of the command line has checked them."""

    served_model_names: tuple[str, ...]
    """Names of the model in requests; metrics report the first one."""
    root_path: str = ""
    """Path prefix that a proxy strips before it forwards a request; links to files include it."""
    media_ttl_seconds: float = 3600.0
    """Seconds for which a picture made with `response_format=url` can be fetched."""
    max_media_bytes: int = 2**30
    """Most bytes of pictures kept in memory for fetching; beyond it the oldest are removed early."""
    default_response_format: ResponseFormat = "b64_json"
    """Form of the pictures if a request has no `response_format`; streams carry b64_json."""
    chat_text_tasks: ChatTextTasks = "empty"
    """Answer to text tasks of chat front ends, such as titles: `empty` text, or `generate` a picture from the task."""
    allowed_media_domains: tuple[str, ...] = ()
    """Hosts from which pictures are fetched that requests name by URL; if empty, no picture is fetched."""
    max_body_bytes: int = 2**20
    """Most bytes of a JSON body without pictures."""
    upload_silence_seconds: float = 30.0
    """Longest pause in an upload, and the time for which it may be too slow: see `UploadRate`."""
    keep_alive_seconds: float = 15.0
    """Seconds without an event after which a stream sends a comment, so that proxies keep it open."""
    num_encoding_threads: int = 2
    """Number of threads that encode PNG, JPEG and WebP, and of processes that decode such files."""
    num_band_threads: int = 4
    """Threads that encode bands of PNG files, shared by all `num_encoding_threads`."""
    disable_docs: bool = False
    """Serve no /docs and no /openapi.json."""
    swagger_ui_folder: Path | None = None
    """Folder with the two files of Swagger UI that /docs needs; None: /docs is a 404 with the reason."""
    requires_api_key: bool = False
    """Whether /openapi.json says that routes under /v1 need a key; a middleware checks the key."""
    log_prompts: bool = False
    log_requests: bool = False
    """Log one line for each request that arrives."""


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
