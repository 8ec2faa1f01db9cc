"""What a model family gives the runner. A family is a package with `info.py` and `pipeline.py` (class `Pipeline`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.compute.cache.base import CacheSlot, SequenceStep, StepCache
from vllm_omni.diffusion.compute.distributed.mesh import Mesh
from vllm_omni.diffusion.compute.step.compiled import CompiledBlocks
from vllm_omni.diffusion.compute.step.cuda_graphs import Capturer
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest


@dataclass(eq=False)
class RequestState:
    """One request on the device, from its encoding to its release; families add what they need.

    A state equals itself alone, so that it can be part of a key.
    """

    request: DiffusionRequest
    latents: Tensor
    """The picture so far, in the family's layout."""
    sequence_lengths: tuple[int, ...]
    """Tokens of each guidance branch, the conditional one first; a family may end guidance early and compute that one
    alone."""
    step: int = 0
    """Denoising steps done."""
    num_made: int = field(default=1, init=False)
    """What the model made in the last of them: a whole pipeline spreads its own steps over those that were planned."""
    cache_slots: tuple[CacheSlot | None, ...] = field(init=False, repr=False)
    """A branch each; None where the request takes no part in caching."""

    def __post_init__(self) -> None:
        self.cache_slots = tuple(CacheSlot() if self.request.cache else None for _ in self.sequence_lengths)

    @property
    def sequence_steps(self) -> list[SequenceStep]:
        """What a step cache must know of each branch."""
        return [SequenceStep(slot, self.step, self.request.num_inference_steps) for slot in self.cache_slots]

    def settle(self) -> int:
        """After a step: how many of the branches that this rank computed came from a cache."""
        return sum([slot.settle() for slot in self.cache_slots if slot is not None])


class Picture(NamedTuple):
    """One decoded picture or video, on the device."""

    pixels: Tensor
    """uint8 [height, width, 3], of a video [frames, height, width, 3]."""
    is_finite: Tensor
    """Bool []: whether the pixels were numbers before they were rounded to bytes."""
    is_blocked: bool = False
    """Whether the model's own safety checker has replaced the picture."""


State = TypeVar("State", bound=RequestState)


class BasePipeline(ABC, Generic[State]):
    """One loaded model. Methods may raise anything: the runner turns it into that request's error.

    A denoising step is `predict` for many requests at once, which changes no state (so it can be repeated
    without the request that failed), then `combine` and `advance` for each.

    Every rank of a replica has the same states and advances them alike; see `Mesh` for who computes what.
    """

    step_cache: StepCache
    """Runs the transformer's blocks."""
    capturer: Capturer | None = None
    """Of the device, where it records the blocks of small steps."""

    def release_memory(self) -> None:
        """Drop what can be made again, for a step that ran out of memory."""

    @classmethod
    @abstractmethod
    def load(
        cls,
        config: OmniDiffusionConfig,
        info: ModelInfo,
        device: torch.device,
        dtype: torch.dtype,
        on_bytes: Callable[[int], object],
        mesh: Mesh,
    ) -> Self:
        """Read the weights that this rank keeps; `on_bytes` is told how many bytes were read since its last call."""

    @classmethod
    def gains_from_compiling(cls, config: OmniDiffusionConfig) -> bool:
        """Whether compiled blocks are faster with these settings, on a device that is worth compiling for."""
        return True

    @abstractmethod
    def compile_blocks(self) -> CompiledBlocks:
        """From here on the transformer's blocks run compiled. Not for whole pipelines."""

    @abstractmethod
    def encode(self, request: DiffusionRequest) -> State:
        """Text and initial noise: the state before the first step."""

    @abstractmethod
    def predict(self, states: Sequence[State], groups: Sequence[int] | None = None) -> list[tuple[Tensor, ...]]:
        """The velocity of each guidance branch, shaped as the latents; one forward of one pack. All ranks take part.

        groups: the rank group that computes each branch, one state's branches after another's; None: the first.
        """

    @abstractmethod
    def combine(self, state: State, branches: Sequence[Tensor]) -> Tensor:
        """One velocity from those of the guidance branches."""

    @abstractmethod
    def advance(self, state: State, velocity: Tensor) -> None:
        """One step of the state's noise schedule."""

    @abstractmethod
    def predict_clean(self, state: State, velocity: Tensor) -> Tensor:
        """The final latents as foreseen from a velocity, before `advance`."""

    @abstractmethod
    def decode(self, requests: Sequence[DiffusionRequest], latents: Sequence[Tensor]) -> list[Picture]:
        """Pixels of the latents, as the family's state holds them.

        Of ranks that share a decode the first has them, the others get [].
        """

    @abstractmethod
    def forget(self, state: State) -> None:
        """Drop whatever is kept because of this state."""
