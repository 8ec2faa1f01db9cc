"""Step plan that the engine sends to workers, and their result. Plain data, sent as msgpack."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vllm_omni.diffusion.data import AttentionBackendName
from vllm_omni.diffusion.messages.adapters import AdapterKey, AdapterRead
from vllm_omni.diffusion.messages.checkpoint import Checkpoint
from vllm_omni.diffusion.messages.item_error import ItemError as ItemError
from vllm_omni.diffusion.messages.request import DiffusionRequest

EXCHANGES = ("all_to_all", "p2p", "all_gather", "all_reduce")
"""Kinds of exchanges between ranks: see `distributed.groups` and `distributed.ring`."""
STAGES = ("text_encode", "denoise", "vae_decode")
"""Names of the stages of a request for users: encode, denoise, decode."""


@dataclass(frozen=True)
class EncodePiece:
    """Latent frames of a conditioning video that one plan encodes, in order from the first frame to the last."""

    first: int
    end: int
    """Number of the latent frame after the last one of the piece."""


@dataclass(frozen=True)
class DecodePiece:
    """Latent frames of a video that one plan decodes, in order from the first frame to the last."""

    first: int
    end: int
    """Number of the latent frame after the last one of the piece."""
    group: int
    """Number of the group of ranks (`Mesh.vae`) that decodes the video: it holds the features of earlier frames."""


@dataclass
class StepPlan:
    """Work of all ranks in one step. A request appears in at most one of `encode`, `denoise` and `decode`.

    A worker handles the fields in this order: `release`, `drop_adapters`, `load_adapters`, `new_requests`,
    `encode_early`, `encode`, `resume`, `denoise`, `checkpoint`, `decode`. So one plan can release a request and send it
    again.
    Ids refer to requests sent in this plan or an earlier one. A plan is sent before the result of the previous one is
    known, so workers skip ids of requests that failed or were aborted meanwhile.
    """

    step_id: int
    new_requests: list[DiffusionRequest] = field(default_factory=list)
    encode: list[str] = field(default_factory=list)
    encode_pieces: dict[str, EncodePiece] = field(default_factory=dict)
    """Part of the encode of requests in `encode`: the first one includes the text. Those without an entry are encoded
    whole."""
    resume: dict[str, Checkpoint] = field(default_factory=dict)
    """Checkpoints of requests in `new_requests` that do not begin at their first step."""
    denoise: list[str] = field(default_factory=list)
    decode: list[str] = field(default_factory=list)
    pieces: dict[str, DecodePiece] = field(default_factory=dict)
    """Part of the decode of requests in `decode`; those without an entry are decoded whole."""
    placement: dict[str, list[int]] = field(default_factory=dict)
    """Rank group of each branch of the requests in `denoise`. Requests without an entry run on the first group."""
    preview: list[str] = field(default_factory=list)
    """Requests in `denoise` whose preview is decoded after the step."""
    checkpoint: list[str] = field(default_factory=list)
    """Requests whose checkpoint is taken: of those in `denoise` after the step, of others at their present step."""
    release: list[str] = field(default_factory=list)
    """Requests that ended (done, failed or aborted); the worker drops their state."""
    drop_adapters: list[AdapterKey] = field(default_factory=list)
    """Adapters that leave the device; no request uses them."""
    load_adapters: list[AdapterKey] = field(default_factory=list)
    """Adapters that a whole pipeline loads now, to see whether it takes them."""
    encode_early: list[DiffusionRequest] = field(default_factory=list)
    """Requests that wait for an adapter: their prompts and pictures are encoded ahead of `encode`."""

    @property
    def num_array_bytes(self) -> int:
        """Bytes of the arrays in the plan: of checkpoints and of input pictures."""
        requests = (*self.new_requests, *self.encode_early)
        pictures = sum(image.num_bytes for request in requests for image in request.images)
        return pictures + sum(checkpoint.num_bytes for checkpoint in self.resume.values())


@dataclass
class StepResult:
    """Result of the plan `step_id`. Pictures are uint8 [height, width, 3], videos [frames, height, width, 3]."""

    step_id: int
    images: dict[str, np.ndarray] = field(default_factory=dict)
    """Finished pictures, and videos that were decoded whole, by request id."""
    frames: dict[str, np.ndarray] = field(default_factory=dict)
    """Frames of the plan's `pieces` by request id: uint8 [frames, height, width, 3]."""
    previews: dict[str, np.ndarray] = field(default_factory=dict)
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    errors: dict[str, ItemError] = field(default_factory=dict)
    advanced: list[str] = field(default_factory=list)
    """Requests whose denoising step succeeded."""
    made: dict[str, int] = field(default_factory=dict)
    """Model steps run for a request of `advanced`, where it is not one. See `RequestState.num_made`."""
    tiled: list[str] = field(default_factory=list)
    """Requests of which a picture was decoded in tiles for the first time, because the whole did not fit the memory."""
    encode_seconds: float = 0.0
    denoise_seconds: float = 0.0
    decode_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    """Seconds that the result waited for copies of checkpoints to the host."""
    num_sequences: int = 0
    """Sequences in the pack."""
    num_tokens: int = 0
    cached: dict[str, float] = field(default_factory=dict)
    """Share of the step that a step cache supplied, up to 1 (all branches). No entry: nothing was cached."""
    cache_bytes: int = 0
    """Bytes that step caches hold on a device."""
    sent_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes that all ranks together sent, by kind of exchange (`EXCHANGES`)."""
    peak_memory_bytes: int = 0
    adapters: list[AdapterRead] = field(default_factory=list)
    """Results of the plan's `load_adapters`."""

    def num_made(self, request_id: str) -> int:
        """Model steps run for a request of `advanced`."""
        return self.made.get(request_id, 1)


@dataclass
class WorkerReady:
    """Measurements of a worker that has loaded its weights and warmed up. The scheduler computes with the rates."""

    load_seconds: float
    load_bytes: int
    device: str
    dtype: str
    max_batch_tokens: int
    """Measured number of tokens beyond which a larger step does not compute a token faster."""
    seconds_per_unit: float
    """Seconds that one unit of `RequestCost` takes."""
    step_overhead_seconds: float
    """Seconds of a denoising step that do not depend on its tokens."""
    encode_units_per_token: float
    """Cost of encoding one prompt token, in units of `RequestCost`; see `ModelInfo.num_encoded_tokens`."""
    decode_units_per_token: float
    """Cost of decoding one image token of one frame, in units of `RequestCost`; see `ModelInfo.num_decoded_tokens`."""
    peak_memory_bytes: int = 0
    attention_backend: AttentionBackendName | None = None
    """Name of the attention backend; None where the model brings its own attention."""
    max_num_seqs: int | None = None
    """Largest number of requests in one step; None: no limit."""
    max_running: int | None = None
    """Largest number of requests that have begun and not ended; None: no limit."""
    num_threads: int = 1
    """CPU threads of this rank (PyTorch's intra-op threads)."""
    cache_bytes: int = 0
    """Memory budget of step caches on the device of this rank, in bytes."""
    adapter_bytes: int = 0
    """Bytes of adapters that the device of each rank keeps even if they are more than its slots."""
    loads_adapters_in_steps: bool = False
    """Whether only a step can tell whether the model takes an adapter, and nothing is encoded ahead of it: true of
    whole pipelines."""
