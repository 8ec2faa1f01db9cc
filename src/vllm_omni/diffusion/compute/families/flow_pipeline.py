"""Base of the packed families' pipelines: encode -> packed steps of flow matching -> decode."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.compute.attention import create_attention
from vllm_omni.diffusion.compute.attention.sharded import PackedAttention
from vllm_omni.diffusion.compute.cache import create_step_cache
from vllm_omni.diffusion.compute.cache.base import SequenceStep
from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.distributed.mesh import Mesh
from vllm_omni.diffusion.compute.families.component_loader import ComponentLoader
from vllm_omni.diffusion.compute.packing import Hidden, MembershipCache, Pack
from vllm_omni.diffusion.compute.step.arrangement import Arrangement
from vllm_omni.diffusion.compute.step.compiled import CompiledBlocks
from vllm_omni.diffusion.compute.step.cuda_graphs import CapturedGraphs, captured
from vllm_omni.diffusion.compute.step.modulation import ModulationTable
from vllm_omni.diffusion.compute.step.pipeline import PackedPipeline, Picture, RequestState
from vllm_omni.diffusion.compute.step.sampling import predict_clean
from vllm_omni.diffusion.compute.step.schedule import with_one_step_schedules
from vllm_omni.diffusion.compute.step.sharding import Sharding
from vllm_omni.diffusion.compute.step.transformer import PackedTransformer, StepBlocks, StepContext
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest


@dataclass(eq=False)
class FlowState(RequestState):
    """State of a request whose latents are tokens: [rows * columns, channels]."""

    text: tuple[Tensor, ...] = ()
    """Text of each guidance branch, the conditional one first: [tokens, D], as the blocks take it."""
    grid: tuple[int, int] = (0, 0)
    """Rows and columns of tokens of the picture."""
    scheduler: Any = None
    """diffusers' scheduler, of this request alone."""
    timesteps: tuple[float, ...] = ()
    """Timestep of each step as the transformer takes it, in [0, 1]."""

    @property
    def num_tokens(self) -> int:
        """Image tokens of the picture."""
        rows, columns = self.grid
        return rows * columns

    @property
    def num_image_tokens(self) -> int:
        """Image tokens in the transformer: those of the picture first, then reference pictures or padding."""
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


@dataclass(frozen=True)
class Forward:
    """Tensors of the sequences that this rank computes, the same at every step; families add fields."""

    arrangement: Arrangement
    text: Tensor
    """Text tokens of these sequences: [T, D]."""


State = TypeVar("State", bound=FlowState)
Transformer = TypeVar("Transformer", bound=PackedTransformer)
AnyForward = TypeVar("AnyForward", bound=Forward)


@dataclass(frozen=True)
class Layout(Generic[AnyForward]):
    """Everything that the steps of one membership share."""

    sharding: Sharding
    forward: AnyForward | None
    """Tensors of the sequences `sharding.mine`, in order; None if this rank's group computes none."""
    captured_graphs: CapturedGraphs = field(default_factory=CapturedGraphs)


class Decoder(Protocol):
    """Makes pixels of token latents."""

    def __call__(self, latents: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> list[Picture]:
        """latents: [rows * columns, channels] and (rows, columns) of each picture -> uint8 [height, width, 3]."""
        ...


class FlowPipeline(PackedPipeline[State], Generic[State, Transformer, AnyForward]):
    """Loaded model of a packed family.

    A family loads its components in `build`, and has `encode`, `rotations`, `lay_out`, `embed`, `project` and
    `combine`. The hooks of a step take and return tensors of this rank's shards, sequence after sequence.
    """

    def __init__(
        self, loader: ComponentLoader, transformer: Transformer, decoder: Decoder, modulation_bytes: int
    ) -> None:
        """modulation_bytes: most memory for rows of modulation that are kept for further requests."""
        mesh = loader.mesh
        self.transformer = transformer
        self.decoder = decoder
        self.step_cache = create_step_cache(loader.config.cache, loader.info, mesh.rank_group)
        self._mesh = mesh
        self._device = loader.device
        self._dtype = loader.dtype
        self._pixels_per_token = loader.info.pixels_per_token
        self._backend = create_attention(loader.config.attention_backend)
        self._attention = PackedAttention(self._backend, mesh.ulysses, mesh.ring)
        self._modulations: ModulationTable[Any] = ModulationTable(transformer.modulate, modulation_bytes)
        self._scheduler = with_one_step_schedules(loader.scheduler())
        """Template of every request's scheduler."""
        self._layouts: MembershipCache[Layout[AnyForward]] = MembershipCache()

    @classmethod
    @abstractmethod
    def build(cls, loader: ComponentLoader) -> Self:
        """Pipeline with the components that `loader` reads."""

    @classmethod
    def load(
        cls,
        config: OmniDiffusionConfig,
        info: PackedModelInfo,
        device: torch.device,
        dtype: torch.dtype,
        on_bytes: Callable[[int], object],
        mesh: Mesh,
    ) -> Self:
        return cls.build(ComponentLoader(config, info, device, dtype, on_bytes, mesh))

    def compile_blocks(self) -> CompiledBlocks:
        return self.transformer.compile_blocks()

    @abstractmethod
    def rotations(self, state: State, num_text_tokens: int) -> tuple[Tensor, Tensor]:
        """RoPE of one whole sequence, on the CPU: float32 [tokens, 1, 1, head_dim / 2, 2], of text and of image."""

    @abstractmethod
    def lay_out(
        self, states: Sequence[State], text: Tensor, pack: Pack, rotations: Tensor, sharding: Sharding
    ) -> AnyForward:
        """Tensors that the steps of these sequences share. states: the state of each sequence that this rank computes.

        text: [T, D] and rotations: [T + S, ...] in joint order, both of this rank's shards, on the device.
        """

    def image_tokens(self, state: State) -> Tensor:
        """[num_image_tokens, channels]: input of the transformer for one whole sequence."""
        return state.latents

    def conditions(self, states: Sequence[State], forward: AnyForward) -> list[Any]:
        """Condition of each row of modulation, see `PackedTransformer.modulate`: the timestep, unless overridden.

        One row a sequence, then rows that only `Arrangement.image_rows` names.
        """
        return [state.timesteps[state.step] for state in states]

    @abstractmethod
    def embed(self, latents: Tensor, context: StepContext, forward: AnyForward) -> Hidden:
        """Input of the first block. latents: [S, channels]."""

    @abstractmethod
    def project(self, hidden: Hidden, context: StepContext, forward: AnyForward) -> Tensor:
        """Velocities [velocity tokens, channels], with the sign of the schedule, from the output of the last block."""

    @abstractmethod
    def combine(self, state: State, branches: Sequence[Tensor]) -> Tensor:
        """One velocity from those of the guidance branches."""

    def predict(self, states: Sequence[State], groups: Sequence[int] | None = None) -> list[tuple[Tensor, ...]]:
        groups_left = iter(groups if groups is not None else [0] * sum(len(s.text) for s in states))
        branches: list[Branch] = []
        for state in states:
            groups_of_state = [next(groups_left) for _ in state.text]
            branches += [Branch(state, text, group) for text, group in zip(state.branches, groups_of_state)]
        key = (*(branch.state for branch in branches), tuple(branch.group for branch in branches))
        layout = self._layouts.get(key, lambda: self._lay_out(branches))
        steps = [step for state in states for step, _ in zip(state.sequence_steps, state.branches)]
        velocities = iter(layout.sharding.gather(self._forward(branches, steps, layout)))
        return [tuple(next(velocities)[: state.num_tokens] for _ in state.branches) for state in states]

    def _forward(self, branches: Sequence[Branch], steps: Sequence[SequenceStep], layout: Layout[AnyForward]) -> Tensor:
        """Velocities [velocity tokens, channels] of the sequences that this rank computes."""
        sharding, forward = layout.sharding, layout.forward
        if forward is None:
            channels = branches[0].state.latents.shape[1]
            return torch.empty((0, channels), dtype=self._dtype, device=self._device)
        states = [branches[i].state for i in sharding.mine]
        modulation = self._modulations.rows_of(self.conditions(states, forward))
        latents = torch.cat([sharding.part(self.image_tokens(state)) for state in states]).to(self._dtype)
        context = StepContext(forward.arrangement, modulation)
        hidden = self.embed(latents, context, forward)
        blocks = captured(StepBlocks(self.transformer, context), layout.captured_graphs, self.capturer)
        hidden = self.step_cache.run(hidden, blocks, [steps[i] for i in sharding.mine])
        return self.project(hidden, context, forward)

    def _lay_out(self, branches: Sequence[Branch]) -> Layout[AnyForward]:
        lengths = [branch.state.num_image_tokens for branch in branches]
        targets = [branch.state.num_velocity_tokens for branch in branches]
        sharding = Sharding(lengths, [branch.group for branch in branches], self._mesh, self._device, targets)
        if not sharding.mine:
            return Layout(sharding, None)
        mine = [branches[i] for i in sharding.mine]
        text_lengths, image_lengths = [len(branch.text) for branch in mine], [lengths[i] for i in sharding.mine]
        pack = Pack.build(text_lengths, image_lengths, self._device, sharding.parts, sharding.index)
        # Text and image of one sequence after another: the joint order.
        rotations = [sharding.part(r) for branch in mine for r in self.rotations(branch.state, len(branch.text))]
        forward = self.lay_out(
            [branch.state for branch in mine],
            torch.cat([sharding.part(branch.text) for branch in mine]),
            pack,
            to_device(torch.cat(rotations), self._device),
            sharding,
        )
        return Layout(sharding, forward)

    def advance(self, state: State, branches: Sequence[Tensor], previews: bool = False) -> Tensor | None:
        velocity = self.combine(state, branches)
        clean = self.predict_clean(state, velocity) if previews else None
        timestep = state.scheduler.timesteps[state.step]
        state.latents = state.scheduler.step(velocity, timestep, state.latents, return_dict=False)[0]
        state.step += 1
        return clean

    def predict_clean(self, state: State, velocity: Tensor) -> Tensor:
        """Final latents as foreseen from the velocity at the state's step."""
        return predict_clean(state.latents, velocity, float(state.scheduler.sigmas[state.step]))

    def decode(self, requests: Sequence[DiffusionRequest], latents: Sequence[Tensor]) -> list[Picture]:
        return self.decoder(latents, [self._grid(request) for request in requests])

    def forget(self, state: State) -> None:
        self._layouts.forget(state)

    def release_memory(self) -> None:
        self._layouts.clear()
        if self.capturer is not None:
            self.capturer.release()

    def _grid(self, request: DiffusionRequest) -> tuple[int, int]:
        """Rows and columns of tokens of the request's picture."""
        return request.height // self._pixels_per_token, request.width // self._pixels_per_token


def branch_prompts(request: DiffusionRequest) -> list[str]:
    """Prompts of the request's guidance branches, the conditional one first."""
    if not request.has_guidance:
        return [request.prompt]
    assert request.negative_prompt is not None
    return [request.prompt, request.negative_prompt]
