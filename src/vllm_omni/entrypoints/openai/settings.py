"""What the HTTP server needs to know beyond the engine's config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ResponseFormat = Literal["b64_json", "url"]
ChatTextTasks = Literal["empty", "generate"]


@dataclass(frozen=True)
class ServerSettings:
    """Frozen; checked by whoever parses the command line."""

    served_model_names: tuple[str, ...]
    """Names that a request's `model` may have; the first is the one reported in metrics."""
    root_path: str = ""
    """Path prefix that a proxy strips before it forwards to us; links to files carry it."""
    media_ttl_seconds: float = 3600.0
    """How long a picture asked for with `response_format=url` can be fetched."""
    max_media_bytes: int = 2**30
    """Most bytes of pictures kept in memory for fetching; beyond it the oldest go early."""
    default_response_format: ResponseFormat = "b64_json"
    """Form of the pictures where a request has no `response_format`; streams carry b64_json."""
    chat_text_tasks: ChatTextTasks = "empty"
    """Answer to text tasks of chat front ends, such as titles: `empty` text, or `generate` a picture from the task."""
    allowed_media_domains: tuple[str, ...] = ()
    """Hosts from which pictures that requests name by URL are fetched; none: none is fetched."""
    max_body_bytes: int = 2**20
    """Most bytes of a JSON request body."""
    upload_silence_seconds: float = 30.0
    """Longest silence, or trickle, in the middle of an upload: see `UploadRate`."""
    keep_alive_seconds: float = 15.0
    """Silence after which an event stream sends a comment, so that proxies keep it open."""
    num_encoding_threads: int = 2
    """Threads that turn pixels into PNG, JPEG or WebP, and as many processes that read such files."""
    num_band_threads: int = 4
    """Threads that share the work on PNG files, together for all of `num_encoding_threads`."""
    disable_docs: bool = False
    """No /docs and /openapi.json."""
    swagger_ui_folder: Path | None = None
    """Folder with the two files of Swagger UI that /docs needs; None: /docs says that it is not available."""
    requires_api_key: bool = False
    """Whether /openapi.json says that routes under /v1 need a key; what checks the key is elsewhere."""
    log_prompts: bool = False
    log_requests: bool = False
    """One log line for each request that arrives."""
