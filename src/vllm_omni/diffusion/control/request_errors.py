"""Errors of requests: from a worker's report to the client's exception and the observer's words."""

from __future__ import annotations

from vllm_omni.diffusion.messages.plan import ItemError
from vllm_omni.errors import (
    GenerationError,
    InvalidRequestError,
    ModerationBlockedError,
    RequestAbortedError,
    RequestError,
    RequestGivenBackError,
)


def request_error(error: ItemError) -> RequestError:
    """Exception for the client: what the client or the operator can change. Tracebacks and paths stay in the log."""
    if error.kind == "invalid":
        return InvalidRequestError(error.message, param=error.param)
    if error.kind == "blocked":
        return ModerationBlockedError(error.message)
    if error.kind == "not_finite":
        return GenerationError(error.message)
    if error.kind == "out_of_memory":
        return GenerationError("the device has not enough memory for this request")
    return GenerationError("the device failed on this request")


def outcome_of(error: RequestError) -> tuple[str, str]:
    """(outcome, reason) for `EngineObserver.on_finish`."""
    if isinstance(error, RequestGivenBackError):
        return "given back", str(error)
    if isinstance(error, RequestAbortedError):
        return "aborted", str(error)
    if isinstance(error, InvalidRequestError):  # its message is for the client: it may quote the prompt
        return "refused", f"wrong {error.param or 'input'}"
    return "failed", str(error)
