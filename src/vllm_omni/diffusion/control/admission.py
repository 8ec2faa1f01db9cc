"""Checks of the ids and the number of new requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_omni.errors import InvalidRequestError


def check_ids(ids: Sequence[str], is_taken: Callable[[str], bool]) -> None:
    """Raise InvalidRequestError for an id that is in use or that appears twice."""
    seen: set[str] = set()
    for request_id in ids:
        if request_id in seen or is_taken(request_id):
            raise InvalidRequestError(f"request id {request_id!r} is in use", param="request_id")
        seen.add(request_id)


def check_number(number: int, most: int) -> None:
    """Raise InvalidRequestError for more requests in one call than a queue of `most` ever holds."""
    if number > most:
        raise InvalidRequestError(f"{number} pictures at once are more than the queue takes ({most})", param="n")
