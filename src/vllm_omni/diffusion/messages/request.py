"""One output to make: all that its pixels depend on, and what it costs. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.images import InputImage


@dataclass(frozen=True)
class RequestCost:
    """Work of one request, in units of one token through the transformer's linear layers."""

    encode: float
    step: float
    decode: float
    branch_tokens: tuple[int, ...]
    """Image (the picture's and its references') and text tokens of each guidance branch."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one denoising step adds to the pack."""
        return sum(self.branch_tokens)

    def total(self, num_steps: int) -> float:
        return self.encode + num_steps * self.step + self.decode


@dataclass(frozen=True)
class LoRA:
    """An adapter over the model's weights."""

    name: str
    path: str
    """Its safetensors file."""
    scale: float


@dataclass(frozen=True)
class DiffusionRequest:
    """A single picture or video: every parameter resolved, so that running it again gives the same pixels."""

    request_id: str
    prompt: str
    negative_prompt: str | None
    """None: no unconditional branch."""
    height: int
    width: int
    num_inference_steps: int
    true_cfg_scale: float
    """s of `unconditional + s (conditional - unconditional)`, whatever the family's own scale."""
    guidance_scale: float | None
    seed: int
    max_sequence_length: int
    sigmas: tuple[float, ...] | None
    priority: int
    preview_steps: tuple[int, ...]
    """After these many steps (1-based, ascending) a prediction of the final picture is delivered."""
    cost: RequestCost
    num_prompt_tokens: int
    num_image_tokens: int
    cache: bool
    """Whether a step cache, if there is one, may skip blocks."""
    arrival: float
    """`time.monotonic()` of the engine's process."""
    cfg_normalization: float = 0.0
    """Longest that guidance may make a velocity, in lengths of the conditional one; 0: any length."""
    cfg_truncation: float = 1.0
    """Guidance ends when more than this part of the schedule's time has passed."""
    images: tuple[InputImage, ...] = ()
    """Pictures to edit, in the order in which the prompt may speak of them."""
    num_reference_tokens: int = 0
    """Image tokens that they add to each guidance branch."""
    strength: float | None = None
    """How far a picture made from another may go from it, in (0, 1]."""
    lora: LoRA | None = None
    """None: the model as it is."""
    num_frames: int = 1
    """Of a video."""
    fps: int | None = None
    """What a model of videos is told that its frames a second are."""

    @property
    def has_guidance(self) -> bool:
        return self.negative_prompt is not None and self.true_cfg_scale > 1


def check_number(number: int, most: int) -> None:
    """Raises InvalidRequestError for more requests at once than a queue of `most` ever takes."""
    if number > most:
        raise InvalidRequestError(f"{number} pictures at once are more than the queue takes ({most})", param="n")


def check_sendable(requests: Sequence[DiffusionRequest]) -> None:
    """Refuse what cannot be sent to a worker while that is one request's failure and not that of a whole plan.

    Raises InvalidRequestError.
    """
    for request in requests:
        try:
            msgspec.msgpack.encode(replace(request, images=()))  # those travel beside the message
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRequestError(f"the request cannot be sent to a worker: {error}") from error
