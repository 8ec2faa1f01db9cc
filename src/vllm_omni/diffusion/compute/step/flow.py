"""What families of packed flow-matching transformers share: the state of a request, its schedule, its decode."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from vllm_omni.diffusion.compute.distributed.mesh import Mesh
from vllm_omni.diffusion.compute.packing import MembershipCache
from vllm_omni.diffusion.compute.step.cuda_graphs import CapturedGraphs
from vllm_omni.diffusion.compute.step.pipeline import PackedPipeline, Picture, RequestState
from vllm_omni.diffusion.compute.step.sampling import predict_clean
from vllm_omni.diffusion.compute.step.schedule import with_one_step_schedules
from vllm_omni.diffusion.compute.step.sharding import Sharding
from vllm_omni.diffusion.messages.request import DiffusionRequest


@dataclass(eq=False)
class FlowState(RequestState):
    text: tuple[Tensor, ...] = ()
    """A guidance branch each (conditional, then unconditional): [tokens, D], as the transformer takes it."""
    scheduler: Any = None
    """diffusers' scheduler, of this request alone."""
    timesteps: tuple[float, ...] = ()
    """What the transformer is told at each step, in [0, 1]."""


State = TypeVar("State", bound=FlowState)
Forward = TypeVar("Forward")


@dataclass(frozen=True)
class Layout(Generic[Forward]):
    """What a membership of sequences shares over its steps."""

    sharding: Sharding
    forward: Forward | None
    """What this rank computes of them, in the order of `sharding.mine`; None when its group computes none."""
    captured_graphs: CapturedGraphs = field(default_factory=CapturedGraphs)


class Decoder(Protocol):
    def __call__(self, latents: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> list[Picture]:
        """Token latents, and rows and columns of tokens, of each picture -> uint8 [height, width, 3]."""
        ...


class FlowPipeline(PackedPipeline[State], Generic[State, Forward]):
    def __init__(
        self, decoder: Decoder, scheduler: FlowMatchEulerDiscreteScheduler, pixels_per_token: int, mesh: Mesh
    ) -> None:
        """scheduler: the template of every request's."""
        self.decoder = decoder
        self._scheduler = with_one_step_schedules(scheduler)
        self._pixels_per_token = pixels_per_token
        self._mesh = mesh
        self._layouts: MembershipCache[Layout[Forward]] = MembershipCache()

    def _grid(self, request: DiffusionRequest) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return request.height // self._pixels_per_token, request.width // self._pixels_per_token

    def advance(self, state: State, branches: Sequence[Tensor], previews: bool = False) -> Tensor | None:
        velocity = self.combine(state, branches)
        clean = self.predict_clean(state, velocity) if previews else None
        timestep = state.scheduler.timesteps[state.step]
        state.latents = state.scheduler.step(velocity, timestep, state.latents, return_dict=False)[0]
        state.step += 1
        return clean

    @abstractmethod
    def combine(self, state: State, branches: Sequence[Tensor]) -> Tensor:
        """One velocity from those of the guidance branches."""

    def predict_clean(self, state: State, velocity: Tensor) -> Tensor:
        """Final latents as foreseen from the velocity at the state's step."""
        return predict_clean(state.latents, velocity, float(state.scheduler.sigmas[state.step]))

    def decode(self, requests: Sequence[DiffusionRequest], latents: Sequence[Tensor]) -> list[Picture]:
        return self.decoder(latents, [self._grid(request) for request in requests])

    def release_memory(self) -> None:
        self._layouts.clear()
        if self.capturer is not None:
            self.capturer.release()

    def forget(self, state: State) -> None:
        self._layouts.forget(state)
