"""States of requests whose latents are tokens, and the sequences of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from vllm_omni.diffusion.compute.step.adapters import Composition
from vllm_omni.diffusion.compute.step.pipeline import Grid, RequestState
from vllm_omni.diffusion.compute.step.saved_state import request_facts
from vllm_omni.diffusion.messages.checkpoint import CheckpointValue


@dataclass(eq=False)
class FlowState(RequestState):
    """State of a request whose latents are tokens: [frames * rows * columns, channels]."""

    text: tuple[Tensor, ...] = ()
    """Text of each guidance branch, the conditional one first: [tokens, D], as the blocks take it."""
    grid: Grid = (0, 0, 0)
    scheduler: Any = None
    """diffusers' scheduler, of this request alone."""
    timesteps: tuple[float, ...] = ()
    """Timestep of each step as the transformer takes it."""
    composition: Composition = ()
    """Adapters of the request."""

    def __post_init__(self) -> None:
        self.sequence_lengths = tuple(self.num_image_tokens + len(text) for text in self.text)
        super().__post_init__()

    @property
    def num_tokens(self) -> int:
        """Image tokens of the picture or video."""
        return math.prod(self.grid)

    @property
    def num_image_tokens(self) -> int:
        """Image tokens in the transformer: those of the output first, then reference pictures or padding."""
        return self.num_tokens

    @property
    def num_velocity_tokens(self) -> int:
        """Image tokens, the first ones, for which the transformer returns a velocity."""
        return self.num_tokens

    @property
    def branches(self) -> tuple[Tensor, ...]:
        """Texts of the guidance branches that the state's step computes: all, or the first alone."""
        return self.text


class Branch(NamedTuple):
    """One sequence of a step."""

    state: Any
    text: Tensor
    group: int
    """Number of the rank group that computes it."""
    number: int
    """Number of the guidance branch within its request; 0: the conditional one."""


def branches_of(states: Sequence[FlowState], groups: Sequence[int] | None) -> Iterator[Branch]:
    """Sequences of a step. groups: see `Pipeline.predict`; they also count branches that the step does not compute."""
    left = iter(groups if groups is not None else [0] * sum(len(state.text) for state in states))
    for state in states:
        its = [next(left) for _ in state.text]
        for number, (text, group) in enumerate(zip(state.branches, its)):
            yield Branch(state, text, group, number)


def facts_of(state: FlowState, step: int) -> dict[str, CheckpointValue]:
    """Facts of the request that a checkpoint at `step` depends on, to tell it from another request's."""
    return request_facts(state.request) | {
        "scheduler": type(state.scheduler).__name__,
        "timestep": state.timesteps[step] if step < len(state.timesteps) else None,
        "adapters": [value for adapter, scale in state.composition for value in (adapter.digest, scale)],
    }
