"""What the engine sends a worker for one step, and what comes back. Plain data, sent as msgpack."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vllm_omni.diffusion.data import AttentionBackendName
from vllm_omni.diffusion.messages.request import DiffusionRequest

EXCHANGES = ("all_to_all", "p2p", "all_gather", "all_reduce")
"""What ranks say to each other: see `distributed.groups` and `distributed.ring`."""


@dataclass
class StepPlan:
    """One step of the device. A request appears in at most one of `encode`, `denoise` and `decode`.

    A worker takes the fields in this order: `release`, `new_requests`, `encode`, `denoise`, `decode`. So a
    request that starts again is released and sent anew in one plan.
    The ids refer to requests sent in this or an earlier plan. An id whose request failed or was aborted
    in the meantime is skipped: plans are sent before the outcome of the last one is known.
    """

    step_id: int
    new_requests: list[DiffusionRequest] = field(default_factory=list)
    encode: list[str] = field(default_factory=list)
    denoise: list[str] = field(default_factory=list)
    decode: list[str] = field(default_factory=list)
    placement: dict[str, list[int]] = field(default_factory=dict)
    """Of `denoise`: the rank group that computes each of its guidance branches. Without an entry: the first group."""
    preview: list[str] = field(default_factory=list)
    """Of `denoise`: decode a prediction of the final picture after the step."""
    release: list[str] = field(default_factory=list)
    """Requests that ended (done, failed or aborted): the worker drops their state."""


@dataclass
class ItemError:
    """Why one request failed while others went on."""

    message: str
    kind: str
    """`out_of_memory`, `invalid`, `blocked` (by the model's own safety checker), `not_finite` (latents or pixels are
    NaN or infinite) or `internal`."""
    traceback: str = ""
    """Empty unless an exception of ours is the reason."""
    param: str | None = None
    """Of an `invalid` request, the parameter that is wrong."""


@dataclass
class StepResult:
    """Outcome of the plan `step_id`. Arrays are uint8 [height, width, 3], of videos [frames, height, width, 3]."""

    step_id: int
    images: dict[str, np.ndarray] = field(default_factory=dict)
    """Finished pictures by request id."""
    previews: dict[str, np.ndarray] = field(default_factory=dict)
    errors: dict[str, ItemError] = field(default_factory=dict)
    advanced: list[str] = field(default_factory=list)
    """Requests that made a denoising step."""
    made: dict[str, int] = field(default_factory=dict)
    """Of `advanced`: steps that the model made for it; of others one. See `RequestState.num_made`."""
    encode_seconds: float = 0.0
    denoise_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_sequences: int = 0
    """Guidance branches in the pack."""
    num_tokens: int = 0
    cached: dict[str, float] = field(default_factory=dict)
    """Of `advanced`: what part of the step came from a step cache, 1 if it was all guidance branches; others none."""
    cache_bytes: int = 0
    """What step caches keep on a device."""
    sent_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes that the ranks, all together, handed to each of `EXCHANGES`."""
    peak_memory_bytes: int = 0

    def num_made(self, request_id: str) -> int:
        """Steps that the model made for one of `advanced`."""
        return self.made.get(request_id, 1)


@dataclass
class WorkerReady:
    """What a worker says once weights are loaded and a warm-up step ran; rates feed the scheduler."""

    load_seconds: float
    load_bytes: int
    device: str
    dtype: str
    max_batch_tokens: int
    """Tokens of a step beyond which packing more gains nothing (measured)."""
    seconds_per_unit: float
    """Seconds of one unit of `RequestCost`."""
    step_overhead_seconds: float
    """Seconds of a denoising step that do not depend on its tokens."""
    encode_units_per_token: float
    """Cost of encoding one prompt token, in units of `RequestCost`."""
    decode_units_per_token: float
    """Cost of decoding one image token, in units of `RequestCost`."""
    peak_memory_bytes: int = 0
    attention_backend: AttentionBackendName | None = None
    """Its name; None where the model brings its own attention."""
    max_num_seqs: int | None = None
    """Most requests in a step that the model takes; None: any number."""
    max_running: int | None = None
    """Most requests that the model holds begun and not done; None: any number."""
    num_threads: int = 1
    """CPU threads that share one operation of this rank."""
    cache_bytes: int = 0
    """Most bytes that step caches keep on the device of this rank."""
