"""Interfaces of a loaded model: `Pipeline` for every family, `PackedPipeline` for those whose steps run on packs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from vllm_omni.diffusion.compute.cache.base import CacheSlot, SequenceStep, StepCache
from vllm_omni.diffusion.compute.device.free_memory import Memory
from vllm_omni.diffusion.compute.distributed.mesh import Mesh
from vllm_omni.diffusion.compute.step.compiled import CompiledBlocks
from vllm_omni.diffusion.compute.step.cuda_graphs import Capturer
from vllm_omni.diffusion.compute.step.saved_state import SavedState
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.adapters import AdapterKey
from vllm_omni.diffusion.messages.checkpoint import Checkpoint
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.errors import InvalidRequestError

DecoderFeatures = dict[Any, list[Any]]
"""Features that a VAE's decoder keeps of the latent frames of a video that it has decoded, for each tile."""


@dataclass(eq=False)
class RequestState:
    """Tensors and counters of one request, from its encoding to its release; families add fields.

    Compared by identity, so that a state can be part of a dictionary key.
    """

    request: DiffusionRequest
    latents: Tensor
    """Latents after `step` steps, in the family's layout."""
    sequence_lengths: tuple[int, ...]
    """Tokens of each guidance branch, the conditional branch first. A family may end guidance early; then a step
    computes the first branch alone."""
    step: int = 0
    """Denoising steps done."""
    first_step: int = field(default=0, init=False)
    """First step of the transformer that computes the present one; a model may change its transformer between steps."""
    num_made: int = field(default=1, init=False)
    """Steps that the model itself made in the last planned step: a whole pipeline may make none or several."""
    cache_slots: tuple[CacheSlot | None, ...] = field(init=False, repr=False)
    """Slot of a step cache for each guidance branch; None for requests that do not take part in caching."""
    decoder_features: DecoderFeatures = field(default_factory=dict, init=False, repr=False)
    """Features of a video whose decode is under way, on the ranks that decode it."""

    def __post_init__(self) -> None:
        self.cache_slots = tuple(CacheSlot() if self.request.cache else None for _ in self.sequence_lengths)

    @property
    def sequence_steps(self) -> list[SequenceStep]:
        """Step of each guidance branch, as a step cache sees it; steps count from `first_step`."""
        step, num_steps = (n - self.first_step for n in (self.step, self.request.num_inference_steps))
        return [SequenceStep(slot, step, num_steps) for slot in self.cache_slots]

    def change_transformer(self) -> None:
        """Let another transformer compute from the present step on: what the caches would keep is of no use to it."""
        self.first_step = self.step
        self.discard()

    def discard(self) -> None:
        """Drop what a step that failed has put into the cache slots."""
        for slot in self.cache_slots:
            if slot is not None:
                slot.discard()

    def settle(self) -> int:
        """End the step in the cache slots. Returns how many branches that this rank computed reused blocks."""
        return sum([slot.settle() for slot in self.cache_slots if slot is not None])


Grid = tuple[int, int, int]
"""Latent frames, rows and columns of the tokens of a picture (one frame) or a video."""


class Picture(NamedTuple):
    """One decoded picture or video, on the device."""

    pixels: Tensor
    """Pixels: uint8 [height, width, 3], of a video [frames, height, width, 3]."""
    is_finite: Tensor
    """Bool []: whether all pixels were finite before they were rounded to bytes."""
    is_blocked: bool = False
    """Whether the model's own safety checker has replaced the picture."""
    is_tiled: bool = False
    """Whether it was decoded in tiles because the device had no memory for the whole."""


State = TypeVar("State", bound=RequestState)


class Pipeline(ABC, Generic[State]):
    """One loaded model. The registry's `PIPELINES` names the subclass of each family.

    A denoising step is `predict` for many requests at once, which changes no state (so it can be repeated without the
    request that failed), then `advance` for each request. Methods may raise anything: the runner turns it into that
    request's error.

    Every rank of a replica has the same states and advances them alike; see `Mesh` for which rank computes which part.
    """

    step_cache: StepCache
    """Runs the transformer's blocks, and may skip some."""

    @classmethod
    @abstractmethod
    def load(
        cls,
        config: OmniDiffusionConfig,
        info: Any,
        device: torch.device,
        dtype: torch.dtype,
        on_bytes: Callable[[int], object],
        mesh: Mesh,
    ) -> Self:
        """Read the weights that this rank keeps.

        info: what the family's `describe` returned. on_bytes: called with the number of bytes read since its last call.
        """

    def check(self, request: DiffusionRequest) -> None:
        """Raise InvalidRequestError for a request that the model cannot run. Exchanges nothing with other ranks.

        Called before the ranks agree on the requests that they encode: an error in `encode` may cost all ranks a
        restart. It may read files for `admit`. Ranks may check different requests, so nothing that they share changes.
        """

    def admit(self, request: DiffusionRequest) -> None:
        """Take over what `check` has read, until `release`: all ranks run the request, and call this in one order."""

    def release(self, request_id: str) -> None:
        """Give back what `check` and `admit` hold for a request. It may be unknown here, and have no state."""

    def read_adapter(self, key: AdapterKey) -> int:
        """Read an adapter into host memory, in any thread, while steps run. Returns the bytes of its weights here.

        Raises InvalidRequestError for a file that the model does not take.
        """
        raise InvalidRequestError("this model takes no LoRA adapters", param="lora_request")

    def forget_adapters(self, keys: Iterable[AdapterKey]) -> None:
        """Drop adapters from host memory, in any thread."""

    def drop_adapters(self, keys: Iterable[AdapterKey]) -> None:
        """Drop adapters that no request uses from the device. All ranks do so in the same step."""

    def load_adapter(self, key: AdapterKey) -> None:
        """Load an adapter into the model, where only that tells whether it fits. Raises InvalidRequestError."""

    def encode_early(self, request: DiffusionRequest) -> None:
        """Encode prompts and pictures of a request whose adapters are not read yet, so that `encode` finds them."""

    @abstractmethod
    def encode(self, request: DiffusionRequest) -> State:
        """State before the first step: text states and initial noise."""

    @abstractmethod
    def predict(self, states: Sequence[State], groups: Sequence[int] | None = None) -> list[tuple[Tensor, ...]]:
        """For each state, the velocity of each guidance branch, shaped as the latents. All ranks take part.

        A whole pipeline computes its step in `advance`, and returns empty tensors here.
        groups: number of the rank group that computes each branch, state by state; None: group 0 computes all.
        """

    @abstractmethod
    def advance(self, state: State, branches: Sequence[Tensor], previews: bool = False) -> Tensor | None:
        """Make one step of the state's noise schedule. branches: the state's tuple from `predict`.

        Returns the final latents as foreseen at this step, where `previews` asks for them and the model can.
        """

    @abstractmethod
    def decode(self, requests: Sequence[DiffusionRequest], latents: Sequence[Tensor]) -> list[Picture]:
        """Pixels of the latents of each request.

        Of ranks that share a decode, the first one returns the pictures and the others return [].
        """

    def decode_preview(self, requests: Sequence[DiffusionRequest], latents: Sequence[Tensor]) -> list[Picture]:
        """Pictures for previews of the requests; latents: what `advance` returned. Ranks share them as in `decode`."""
        return self.decode(requests, latents)

    @abstractmethod
    def forget(self, state: State) -> None:
        """Drop everything kept for this state."""

    def release_memory(self) -> None:
        """Drop what can be made again, after a step ran out of memory."""


class PackedPipeline(Pipeline[State]):
    """A loaded model whose transformer runs on packs: one forward for the sequences of many requests."""

    capturer: Capturer | None = None
    """Captures the blocks of small steps as CUDA graphs; None: all steps run eagerly."""
    components: Mapping[str, Sequence[nn.Module]]
    """Modules of each component: `text_encoder`, `image_encoder` (where there is one), `transformer`, `vae`."""

    def watch_memory(self, memory: Memory, least_free_bytes: int | None) -> None:
        """Decode and encode pictures in tiles from now on where the whole does not fit `memory`. No-op by default.

        least_free_bytes: memory that is free on the rank with least, of several; None: there is one rank.
        """

    @classmethod
    def gains_from_compiling(cls, config: OmniDiffusionConfig) -> bool:
        """Whether compiled blocks are faster with these settings, on a device that is worth compiling for."""
        return True

    def begin_encode(self, request: DiffusionRequest) -> State:
        """State before the first step, without its conditioning video, which `encode_next` adds piece by piece.

        Called for requests that have `ModelInfo.num_encoded_frames` above 1.
        """
        raise NotImplementedError("this family encodes no videos")

    def encode_next(self, state: State, frames: range) -> None:
        """Encode the next latent frames of the conditioning video. Exchanges nothing with other ranks.

        Pieces come in order, and the state keeps what the next one needs. After the last one the state is that of
        `encode`. A piece that fails cannot be repeated.
        """
        raise NotImplementedError("this family encodes no videos")

    @abstractmethod
    def decode_next(self, state: State, frames: range) -> Picture | None:
        """Pixels [frames, height, width, 3] of the next latent frames of a video whose denoising is done.

        Pieces come in order; the state keeps what the next one needs. Of ranks that share a decode, the first one
        returns the pixels and the others return None.
        """

    @abstractmethod
    def save(self, state: State) -> SavedState:
        """State of a request between two steps, for a checkpoint. Launches nothing and keeps `state` unchanged."""

    @abstractmethod
    def resume(self, state: State, checkpoint: Checkpoint) -> None:
        """Move a state, as `encode` made it, to the checkpoint's step. Exchanges nothing with other ranks.

        Raises InvalidRequestError for a checkpoint that does not fit the request; `state` is of no use then.
        """

    @abstractmethod
    def compile_blocks(self) -> CompiledBlocks:
        """Replace the blocks of all transformers by compiled ones."""

    def transformer_index(self, state: State) -> int:
        """Number of the transformer that computes the state's step: 0, unless overridden."""
        return 0
