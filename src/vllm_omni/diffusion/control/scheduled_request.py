"""Request as the engine schedules it: the workers' part, its price, and how it is queued and reported."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from vllm_omni.diffusion.messages.checkpoint import Checkpoint
from vllm_omni.diffusion.messages.request import DiffusionRequest


@dataclass(frozen=True)
class RequestCost:
    """Work of one request. A unit is the work of one token in the transformer's linear layers."""

    encode: float
    step: float
    decode: float
    branch_tokens: tuple[int, ...]
    """Tokens of each branch: text, the picture's and its input pictures'."""
    encode_video: float = 0.0
    """Part of `encode` for a conditioning video whose encode is cut into pieces."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one denoising step adds to the pack."""
        return sum(self.branch_tokens)

    def total(self, num_steps: int) -> float:
        """Units of a whole request."""
        return self.encode + num_steps * self.step + self.decode


@dataclass(frozen=True)
class ScheduledRequest:
    """A request and everything that scheduling and reports need; workers get `request` alone."""

    request: DiffusionRequest
    cost: RequestCost
    num_prompt_tokens: int
    num_image_tokens: int
    """Tokens of the picture that is made."""
    num_latent_frames: int = 1
    """Latent frames of a video, whose decode is cut into pieces; 1: the request is decoded whole."""
    num_encoded_frames: int = 1
    """Latent frames of a conditioning video, whose encode is cut into pieces; 1: the encode is one item."""
    num_reference_tokens: int = 0
    """Tokens that the input pictures add to each branch."""
    priority: int = 0
    """Smaller runs earlier."""
    preview_steps: tuple[int, ...] = ()
    """Steps (1-based, ascending) after which a preview is delivered."""
    is_resumable: bool = True
    """Whether the model can give checkpoints."""
    resume: Checkpoint | None = None
    """Checkpoint that the request begins from; None: it begins at its first step."""
    checkpoint_seconds: float | None = None
    """Device seconds of the request's denoising steps between two checkpoints; None: it gives none by itself."""
    arrival: float = 0.0
    """Time of arrival: `time.monotonic()` of this process."""

    @property
    def frame_cost(self) -> float:
        """Units to decode one latent frame."""
        return self.cost.decode / self.num_latent_frames

    @property
    def encoded_frame_cost(self) -> float:
        """Units to encode one latent frame of the conditioning video."""
        return self.cost.encode_video / self.num_encoded_frames

    @property
    def conditioning_video(self) -> Hashable:
        """Key of the conditioning video: requests of the same model with equal keys encode the same one."""
        request = self.request
        return request.images, request.num_frames, request.height, request.width

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_steps(self) -> int:
        """Denoising steps from start to end."""
        return self.request.num_inference_steps
