"""What the HTTP server needs to know beyond the engine's config."""

from __future__ import annotations

from dataclasses import dataclass


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
    allowed_media_domains: tuple[str, ...] = ()
    """Hosts from which pictures that requests name by URL are fetched; none: none is fetched."""
    max_body_bytes: int = 2**20
    """Most bytes of a JSON request body."""
    upload_silence_seconds: float = 30.0
    """Longest silence, or trickle, in the middle of an upload: see `Pace`."""
    keep_alive_seconds: float = 15.0
    """Silence after which an event stream sends a comment, so that proxies keep it open."""
    num_encoding_threads: int = 2
    """Threads that turn pixels into PNG, JPEG or WebP, and as many that read such files."""
    disable_docs: bool = False
    """No /docs, /redoc and /openapi.json."""
    log_prompts: bool = False
