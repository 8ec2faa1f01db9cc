"""Effects of a step's result, or of a worker's death, on requests."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_omni.diffusion.control.queue.entries import Item, Phase
from vllm_omni.diffusion.messages.checkpoint import Checkpoint
from vllm_omni.diffusion.messages.plan import ItemError, StepResult


@dataclass
class Update:
    """Requests that advanced, ended or start again. Requests that were aborted meanwhile are not in it."""

    steps: dict[str, int] = field(default_factory=dict)
    """Request id -> denoising steps done, for each request that made one."""
    encoded: dict[str, float] = field(default_factory=dict)
    """Request id -> share of its encode that is done, for each request of which a piece was encoded."""
    checkpoints: dict[str, Checkpoint | None] = field(default_factory=dict)
    """New checkpoints by request id, and answers to `Scheduler.request_checkpoint`."""
    frames: list[str] = field(default_factory=list)
    """Requests of which a piece of the video was decoded."""
    finished: list[str] = field(default_factory=list)
    failed: dict[str, ItemError] = field(default_factory=dict)
    replayed: list[str] = field(default_factory=list)
    """Requests that start again, from their newest checkpoint or from their first step."""


def error_of(item: Item, result: StepResult) -> ItemError | None:
    """Error of `item` in `result`, also where the worker reports neither success nor failure; None for success."""
    request_id = item.entry.request.request_id
    if error := result.errors.get(request_id):
        return error
    decoded = result.frames if item.is_decode_piece else result.images
    done = {Phase.ENCODE: True, Phase.DENOISE: request_id in result.advanced, Phase.DECODE: request_id in decoded}
    if done[item.phase]:
        return None
    return ItemError(f"the worker lost the request before its {item.phase.name.lower()}", "internal")
