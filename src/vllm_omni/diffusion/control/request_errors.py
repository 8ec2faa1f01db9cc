"""Errors of requests: from a worker's report to the client's exception and the observer's words."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_omni.diffusion.messages.plan import ItemError
from vllm_omni.diffusion.messages.request import LoRA
from vllm_omni.errors import (
    AdapterChangedError,
    GenerationError,
    InvalidRequestError,
    ModerationBlockedError,
    RequestAbortedError,
    RequestError,
    RequestGivenBackError,
)


def request_error(error: ItemError, loras: Sequence[LoRA] = ()) -> RequestError:
    """Exception for the client: what the client or the operator can change. Tracebacks and paths stay in the log.

    loras: adapters of the request, whose names stand for their files.
    """
    if error.kind in ("invalid", "changed"):
        message = error.message
        for lora in loras:
            message = message.replace(lora.path, repr(lora.name))
        kind = InvalidRequestError if error.kind == "invalid" else AdapterChangedError
        return kind(message, param=error.param)
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
