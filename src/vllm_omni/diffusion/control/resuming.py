"""Requests of a job that resumes from a checkpoint, or that gives checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.messages.checkpoint import Checkpoint, check_checkpoint
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.field_values import shown


def with_checkpoints(
    requests: Sequence[ScheduledRequest], info: ModelInfo, resume: Checkpoint | None, checkpoint_seconds: float | None
) -> list[ScheduledRequest]:
    """Requests that begin from `resume`, and give a checkpoint after each `checkpoint_seconds` of their steps.

    A model that gives no checkpoints ignores `checkpoint_seconds`. Raises InvalidRequestError for a wrong type, for
    seconds that are not positive, for a checkpoint that no such request can have written, for several requests that
    shall resume from one, and where the model cannot resume.
    """
    if checkpoint_seconds is not None and not (_is_number(checkpoint_seconds) and checkpoint_seconds > 0):
        raise InvalidRequestError(
            f"checkpoint_seconds takes a number above 0 or None, got {shown(checkpoint_seconds)}",
            param="checkpoint_seconds",
        )
    if resume is not None:
        if not isinstance(resume, Checkpoint):
            raise InvalidRequestError(f"resume takes a Checkpoint or None, got {shown(resume)}", param="resume")
        if not info.gives_checkpoints:
            raise InvalidRequestError(
                "resume takes None: this model runs as a whole pipeline, which gives no checkpoints", param="resume"
            )
        if len(requests) > 1:
            raise InvalidRequestError(f"resume takes one output, got {len(requests)}", param="num_outputs_per_prompt")
        check_checkpoint(resume, requests[0].num_steps)
    return [
        replace(
            request,
            is_resumable=info.gives_checkpoints,
            resume=resume,
            checkpoint_seconds=checkpoint_seconds if info.gives_checkpoints else None,
        )
        for request in requests
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
