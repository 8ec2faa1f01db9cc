"""Failure of one request, as a worker reports it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ItemError:
    """Failure of one request; the other requests of the step are not affected."""

    message: str
    kind: str
    """`out_of_memory`, `invalid`, `blocked` (by the model's own safety checker), `not_finite` (latents or pixels are
    NaN or infinite), `changed` (the file of an adapter was written meanwhile) or `internal`."""
    traceback: str = ""
    """Traceback for the log; empty unless `kind` is `internal` or `out_of_memory`."""
    param: str | None = None
    """Wrong parameter of an `invalid` request."""
