"""Request as a worker gets it: everything that the pixels of one picture or video depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from vllm_omni.diffusion.messages.adapters import AdapterKey
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.images import InputImage


@dataclass(frozen=True)
class LoRA:
    """An adapter over the model's weights, with the scale of its changes."""

    name: str
    path: str
    """Path of its safetensors file."""
    scale: float
    stamp: str = field(default="", compare=False)
    """State of the file: see `AdapterKey`."""

    @property
    def key(self) -> AdapterKey:
        return AdapterKey(self.path, self.stamp)


@dataclass(frozen=True)
class DiffusionRequest:
    """One picture or video with every parameter resolved: running the request again gives the same pixels."""

    request_id: str
    prompt: str
    height: int
    width: int
    num_inference_steps: int
    seed: int
    max_sequence_length: int
    """Longest prompt in tokens."""
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0
    """s of `unconditional + s (conditional - unconditional)`, whatever the family calls its scale; 1: no guidance."""
    guidance_scale: float | None = None
    """`guidance_scale` of a whole pipeline's call: its scale of guidance, or a number that its model reads."""
    cfg_normalization: float = 0.0
    """Upper limit of a guided velocity's norm, relative to the conditional one; 0: no limit."""
    cfg_truncation: float = 1.0
    """Share of the schedule's time after which guidance ends."""
    sigmas: tuple[float, ...] | None = None
    """Noise level of each step, before any shift; None: the family's own schedule."""
    cache: bool = False
    """Whether the step cache may skip blocks."""
    images: tuple[InputImage, ...] = ()
    """Input pictures, in the order in which the prompt may name them."""
    strength: float | None = None
    """Share of the schedule that img2img runs, in (0, 1]: how much the input picture may change."""
    loras: tuple[LoRA, ...] = ()
    """Adapters, whose changes add up; none: the model's own weights."""
    num_frames: int = 1
    """Frames of a video; 1 for a picture."""
    fps: int | None = None
    """Frames a second of a video; some models are told."""
    guidance_scale_2: float | None = None
    """s of the steps that a model's second transformer computes; None: `true_cfg_scale`."""
    flow_shift: float | None = None
    """Shift of the noise schedule towards its noisy end; None: the model's own, which may follow from the size."""

    @property
    def has_guidance(self) -> bool:
        """Whether there is an unconditional branch."""
        return self.true_cfg_scale > 1

    @property
    def branch_prompts(self) -> list[str]:
        """Prompts of the guidance branches, the conditional one first."""
        if not self.has_guidance:
            return [self.prompt]
        assert self.negative_prompt is not None
        return [self.prompt, self.negative_prompt]


def check_sendable(requests: Sequence[DiffusionRequest]) -> None:
    """Raise InvalidRequestError for a request that msgpack cannot encode, before a plan with it fails for others."""
    for request in requests:
        try:
            msgspec.msgpack.encode(replace(request, images=()))  # arrays travel beside the message
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRequestError(f"the request cannot be sent to a worker: {error}") from error
