"""Base of the packed families' pipelines: encode -> packed steps of flow matching -> decode."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.compute.attention import create_attention
from vllm_omni.diffusion.compute.attention.sharded import PackedAttention
from vllm_omni.diffusion.compute.cache import create_step_cache
from vllm_omni.diffusion.compute.cache.base import SequenceStep
from vllm_omni.diffusion.compute.device.free_memory import Memory
from vllm_omni.diffusion.compute.device.movable_weights import Movable, MovableWeights
from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.distributed.mesh import Mesh
from vllm_omni.diffusion.compute.families.adapter_store import AdapterStore
from vllm_omni.diffusion.compute.families.component_loader import ComponentLoader
from vllm_omni.diffusion.compute.families.decoders import Decoder, VideoDecoder
from vllm_omni.diffusion.compute.families.flow_state import Branch, FlowState, branches_of, facts_of
from vllm_omni.diffusion.compute.offload.turns import TRANSFORMERS, VAE
from vllm_omni.diffusion.compute.packing import Hidden, MembershipCache, Pack
from vllm_omni.diffusion.compute.step.adapters import (
    AdaptedCondition,
    ChangedLayers,
    LoadedAdapter,
    PackAdapters,
    modulate_adapted,
)
from vllm_omni.diffusion.compute.step.arrangement import Arrangement
from vllm_omni.diffusion.compute.step.compiled import CompiledBlocks
from vllm_omni.diffusion.compute.step.cuda_graphs import CapturedGraphs, captured
from vllm_omni.diffusion.compute.step.modulation import ModulationTable
from vllm_omni.diffusion.compute.step.pipeline import Grid, PackedPipeline, Picture
from vllm_omni.diffusion.compute.step.sampling import predict_clean, tokens_of_frames
from vllm_omni.diffusion.compute.step.saved_state import SavedState, restore_state, save_state
from vllm_omni.diffusion.compute.step.schedule import make_schedule, with_one_step_schedules
from vllm_omni.diffusion.compute.step.sharding import Sharding
from vllm_omni.diffusion.compute.step.transformer import PackedTransformer, StepBlocks, StepContext
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.adapters import AdapterKey, KeptFiles
from vllm_omni.diffusion.messages.checkpoint import Checkpoint
from vllm_omni.diffusion.messages.request import DiffusionRequest

State = TypeVar("State", bound=FlowState)
Transformer = TypeVar("Transformer", bound=PackedTransformer)


@dataclass(frozen=True)
class Forward(Generic[Transformer]):
    """Tensors of the sequences that this rank computes, the same at every step; families add fields."""

    transformer: Transformer
    """Transformer of all sequences of the pack."""
    arrangement: Arrangement
    text: Tensor
    """Text tokens of these sequences: [T, D]."""


AnyForward = TypeVar("AnyForward", bound=Forward[Any])


KEPT_LAYOUTS = 4
"""Layouts kept for each transformer: the scheduler may alternate between memberships."""


@dataclass(frozen=True)
class Layout(Generic[AnyForward]):
    """Everything that the steps of one membership share."""

    sharding: Sharding
    forward: AnyForward | None
    """Tensors of the sequences `sharding.mine`, in order; None if this rank's group computes none."""
    adapters: PackAdapters | None
    """Adapters of these sequences; None: none has one."""
    captured_graphs: CapturedGraphs = field(default_factory=CapturedGraphs)


class FlowPipeline(PackedPipeline[State], Generic[State, Transformer, AnyForward]):
    """Loaded model of a packed family, with one or several transformers.

    A family loads its components in `build`, and has `encode` (by `new_state`), `rotations`, `lay_out`, `embed`,
    `project` and `combine`. The hooks of a step take and return tensors of this rank's shards, sequence after sequence.
    """

    shifts_by_size: ClassVar[bool] = True
    """Whether the noise schedule depends on the number of tokens of the output; False: the scheduler's own schedule."""
    adapter_converter: ClassVar[str] = ""
    """Class of `diffusers.loaders.lora_pipeline` that knows the names of the family's adapter files; empty: none."""
    kept_bytes: ClassVar[int] = 0
    """Most bytes of what is kept on the device for further requests: rows of modulation, embeddings."""

    def __init__(
        self, loader: ComponentLoader, transformers: Sequence[Transformer], decoder: Decoder, modulation_bytes: int
    ) -> None:
        """modulation_bytes: most memory for rows of modulation that are kept for further requests."""
        mesh = loader.mesh
        self.transformers = tuple(transformers)
        self.decoder = decoder
        self.step_cache = create_step_cache(loader.config.cache, loader.info, mesh.rank_group)
        self._mesh = mesh
        self._device = loader.device
        self._dtype = loader.dtype
        self._info = loader.info
        self.components = loader.components
        self.layer_offload = loader.layer_offload
        self.turns = loader.turns
        self._decode = self.turns.during(VAE, decoder)
        self._prompt_caches = loader.prompt_caches
        self._tile_choice = loader.tile_choice
        self._backend = create_attention(loader.config.attention_backend)
        self._attention = PackedAttention(self._backend, mesh.ulysses, mesh.ring)
        bytes_of_one = modulation_bytes // len(self.transformers)
        self._modulations = [
            ModulationTable[AdaptedCondition](partial(modulate_adapted, transformer, index), bytes_of_one)
            for index, transformer in enumerate(self.transformers)
        ]
        """One table for each transformer."""
        self._adapters = AdapterStore(loader, self.transformers, self.adapter_converter, self._forget_adapter)
        self._scheduler = with_one_step_schedules(loader.scheduler())
        """Template of every request's scheduler."""
        self._layouts: MembershipCache[Layout[AnyForward]] = MembershipCache(KEPT_LAYOUTS * len(self.transformers))

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
        loader = ComponentLoader(config, info, device, dtype, on_bytes, mesh)
        _ = loader.single_files  # a file that does not fit is refused before any weight is read
        pipeline = cls.build(loader)
        # Its parts are replaced and moved until the decoder is made.
        loader.turns.keep(VAE, loader.components.get(VAE, ()))
        return pipeline

    def watch_memory(self, memory: Memory, least_free_bytes: int | None) -> None:
        self._tile_choice.watch(memory, least_free_bytes)

    def compile_blocks(self) -> CompiledBlocks:
        return self.transformer.compile_blocks(others=self.transformers[1:])

    @property
    def transformer(self) -> Transformer:
        """The first transformer, which most families have alone."""
        return self.transformers[0]

    @abstractmethod
    def rotations(self, state: State, num_text_tokens: int) -> tuple[Tensor, Tensor]:
        """RoPE of one whole sequence, on the CPU: float32 [tokens, 1, 1, head_dim / 2, 2], of text and of image."""

    @abstractmethod
    def lay_out(
        self, branches: Sequence[Branch], text: Tensor, pack: Pack, rotations: Tensor, sharding: Sharding
    ) -> AnyForward:
        """Tensors that the steps of these sequences share. branches: those that this rank computes, of one transformer.

        text: [T, D] and rotations: [T + S, ...] in joint order, both of this rank's shards, on the device.
        """

    def timesteps(self, scheduler: Any) -> tuple[float, ...]:
        """Timestep of each step of a schedule, as the transformer takes it: the scheduler's own, unless overridden."""
        return tuple(scheduler.timesteps.tolist())

    def check(self, request: DiffusionRequest) -> None:
        self._schedule(request)
        self._adapters.check(request)

    def admit(self, request: DiffusionRequest) -> None:
        self._adapters.admit(request)

    def release(self, request_id: str) -> None:
        self._adapters.release(request_id)

    def read_adapter(self, key: AdapterKey, kept: KeptFiles | None = None) -> int:
        return self._adapters.read(key, kept)

    def forget_adapters(self, keys: Iterable[AdapterKey]) -> None:
        self._adapters.forget(keys)

    def drop_adapters(self, keys: Iterable[AdapterKey]) -> None:
        self._adapters.drop(keys)

    def adapted(self, request: DiffusionRequest, index: int = 0) -> AbstractContextManager[None]:
        """Let a transformer's layers add the changes of the request's adapters: for texts, which `encode` embeds.

        index: of the transformer.
        """
        composition = self._adapters.composition(request)
        return ChangedLayers.of_all_rows(self.transformers[index], index, composition).applied()

    def transformer_turn(self, index: int = 0) -> AbstractContextManager[None]:
        """Have a transformer on the device meanwhile: see `Turns.use`."""
        return self.turns.use(TRANSFORMERS[index])

    def _forget_adapter(self, adapter: LoadedAdapter) -> None:
        for table in self._modulations:
            table.forget(lambda condition: any(its is adapter for its, _ in condition.composition))
        # A captured graph reads the weights by their addresses: it goes before their memory is reused.
        self._layouts.drop(lambda layout: layout.adapters is not None and adapter in layout.adapters)

    def _schedule(self, request: DiffusionRequest) -> Any:
        """Scheduler of the request, at its first step. Raises InvalidRequestError: see `make_schedule`."""
        num_tokens = math.prod(self.grid(request)) if self.shifts_by_size else None
        return make_schedule(self._scheduler, request, num_tokens)

    def new_state(
        self, cls: type[State], request: DiffusionRequest, text: tuple[Tensor, ...], latents: Tensor, **own: Any
    ) -> State:
        """State before the first step, for `encode`. Computes the rows of modulation of the whole schedule.

        text: see `FlowState.text`; latents: [tokens, channels], the noise; own: the family's fields of the state.
        """
        scheduler = self._schedule(request)
        state = cls(
            request=request,
            latents=latents,
            sequence_lengths=(),
            text=text,
            grid=self.grid(request),
            scheduler=scheduler,
            timesteps=self.timesteps(scheduler),
            composition=self._adapters.composition(request),
            **own,
        )
        at = copy.copy(state)
        conditions: list[list[Any]] = [[] for _ in self.transformers]
        for at.step in range(len(state.timesteps)):
            conditions[self.transformer_index(at)].append(self.condition(at))
        for index, of_steps in enumerate(conditions):
            if of_steps:
                its = [*of_steps, *self.further_conditions(state)]
                with self.transformer_turn(index):
                    self._modulations[index].prefetch([AdaptedCondition.of(index, c, state.composition) for c in its])
        return state

    def image_tokens(self, state: State) -> Tensor:
        """[num_image_tokens, channels]: input of the transformer for one whole sequence."""
        return state.latents

    def condition(self, state: State) -> Any:
        """Condition of the state's sequences, see `PackedTransformer.modulate`: the timestep, unless overridden."""
        return state.timesteps[state.step]

    def further_conditions(self, state: State) -> tuple[Any, ...]:
        """Conditions of the further rows of modulation that image tokens of this state have: none, unless overridden.

        A pack's rows are those of its sequences, then the distinct further ones of its states, in order.
        `Arrangement(image_rows=...)` gives them to image tokens.
        """
        return ()

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
        branches = list(branches_of(states, groups))
        steps = [step for state in states for step, _ in zip(state.sequence_steps, state.branches)]
        indices = [self.transformer_index(branch.state) for branch in branches]
        velocities: dict[int, Tensor] = {}
        for index in sorted(set(indices)):  # a pack for each transformer
            members = [i for i, its in enumerate(indices) if its == index]
            velocities |= zip(
                members, self._predict(index, [branches[i] for i in members], [steps[i] for i in members])
            )
        ordered = (velocities[i] for i in range(len(branches)))
        return [tuple(next(ordered)[: state.num_tokens] for _ in state.branches) for state in states]

    def _predict(self, index: int, branches: Sequence[Branch], steps: Sequence[SequenceStep]) -> list[Tensor]:
        """Velocity of each of these sequences, all of the transformer `index`."""
        key = (index, tuple(branch.group for branch in branches), *(branch.state for branch in branches))
        layout = self._layouts.get(key, lambda: self._lay_out(index, branches))
        with self.transformer_turn(index):
            return layout.sharding.gather(self._forward(index, branches, steps, layout))

    def _forward(
        self, index: int, branches: Sequence[Branch], steps: Sequence[SequenceStep], layout: Layout[AnyForward]
    ) -> Tensor:
        """Velocities [velocity tokens, channels] of the sequences that this rank computes."""
        sharding, forward = layout.sharding, layout.forward
        if forward is None:
            channels = branches[0].state.latents.shape[1]
            return torch.empty((0, channels), dtype=self._dtype, device=self._device)
        states = [branches[i].state for i in sharding.mine]
        conditions = [AdaptedCondition.of(index, self.condition(state), state.composition) for state in states]
        modulation = self._modulations[index].rows_of([*conditions, *self._further(index, states)])
        latents = torch.cat([sharding.part(self.image_tokens(state)) for state in states]).to(self._dtype)
        context = StepContext(forward.arrangement, modulation, layout.adapters)
        with context.adapted():
            hidden = self.embed(latents, context, forward)
        blocks = captured(StepBlocks(forward.transformer, context), layout.captured_graphs, self.capturer)
        hidden = self.step_cache.run(hidden, blocks, [steps[i] for i in sharding.mine])
        with context.adapted():
            return self.project(hidden, context, forward)

    def _further(self, index: int, states: Sequence[State]) -> list[AdaptedCondition]:
        """Distinct further conditions of the states, in order: see `further_conditions`."""
        found = [
            AdaptedCondition.of(index, condition, state.composition)
            for state in states
            for condition in self.further_conditions(state)
        ]
        return list(dict.fromkeys(found))

    def rows_of_tokens(self, branches: Sequence[Branch], marks: Sequence[Tensor], pack: Pack) -> Tensor | None:
        """Row of modulation of each image token, int64 [S]; a marked one has that of its state's further condition.

        marks: bool [image tokens of this rank], of each sequence, on the CPU. None: no state has further conditions.
        """
        states = [branch.state for branch in branches]
        if not any(map(self.further_conditions, states)):
            return None
        index = self.transformer_index(states[0])
        further = self._further(index, states)
        rows = []
        for number, (state, mark) in enumerate(zip(states, marks)):
            own = number
            if its := self.further_conditions(state):
                own = len(states) + further.index(AdaptedCondition.of(index, its[0], state.composition))
            rows.append(torch.where(mark, own, number))
        return to_device(torch.cat(rows), self._device)

    def _lay_out(self, index: int, branches: Sequence[Branch]) -> Layout[AnyForward]:
        lengths = [branch.state.num_image_tokens for branch in branches]
        targets = [branch.state.num_velocity_tokens for branch in branches]
        sharding = Sharding(lengths, [branch.group for branch in branches], self._mesh, self._device, targets)
        if not sharding.mine:
            return Layout(sharding, None, None)
        mine = [branches[i] for i in sharding.mine]
        text_lengths, image_lengths = [len(branch.text) for branch in mine], [lengths[i] for i in sharding.mine]
        pack = Pack.build(text_lengths, image_lengths, self._device, sharding.parts, sharding.index)
        compositions = [branch.state.composition for branch in mine]
        adapters = PackAdapters(self.transformers[index], index, pack, compositions) if any(compositions) else None
        # Text and image of one sequence after another: the joint order.
        rotations = [sharding.part(r) for branch in mine for r in self.rotations(branch.state, len(branch.text))]
        forward = self.lay_out(
            mine,
            torch.cat([sharding.part(branch.text) for branch in mine]),
            pack,
            to_device(torch.cat(rotations), self._device),
            sharding,
        )
        return Layout(sharding, forward, adapters)

    def advance(self, state: State, branches: Sequence[Tensor], previews: bool = False) -> Tensor | None:
        velocity = self.combine(state, branches)
        clean = self.predict_clean(state, velocity) if previews else None
        timestep = state.scheduler.timesteps[state.step]
        state.latents = state.scheduler.step(velocity, timestep, state.latents, return_dict=False)[0]
        self._count_step(state)
        return clean

    def _count_step(self, state: State) -> None:
        """Count a step as done; the next one may belong to another transformer."""
        index = self.transformer_index(state)
        state.step += 1
        if state.step < len(state.timesteps) and self.transformer_index(state) != index:
            state.change_transformer()

    def save(self, state: State) -> SavedState:
        return save_state(state.latents, state.scheduler, state.step, facts_of(state, state.step))

    def resume(self, state: State, checkpoint: Checkpoint) -> None:
        facts = facts_of(state, checkpoint.step)
        state.latents = restore_state(checkpoint, state.latents, state.scheduler, facts, self._dtype)
        while state.step < checkpoint.step:
            self._count_step(state)

    def predict_clean(self, state: State, velocity: Tensor) -> Tensor:
        """Final latents as foreseen from the velocity at the state's step."""
        return predict_clean(state.latents, velocity, float(state.scheduler.sigmas[state.step]))

    def decode(self, requests: Sequence[DiffusionRequest], latents: Sequence[Tensor]) -> list[Picture]:
        return self._decode(latents, [self.grid(request) for request in requests])

    def decode_preview(self, requests: Sequence[DiffusionRequest], latents: Sequence[Tensor]) -> list[Picture]:
        """Pictures for previews. Of a video, the middle latent frame is decoded alone, as if it were the first.

        That costs one latent frame instead of all up to the middle. Details differ a little from those of the finished
        frame, because a decoder of videos expects the features of earlier frames.
        """
        grids = [self.grid(request) for request in requests]
        middles = [
            tokens_of_frames(tokens, grid, range(grid[0] // 2, grid[0] // 2 + 1))
            for tokens, grid in zip(latents, grids)
        ]
        return self._decode(middles, [(1, *grid[1:]) for grid in grids])

    def decode_next(self, state: State, frames: range) -> Picture | None:
        assert isinstance(self.decoder, VideoDecoder), "only the decode of a video is cut"
        with self.turns.use(VAE):
            made = self.decoder.decode_next(state.latents, state.grid, frames, state.decoder_features)
        if frames.stop == state.grid[0]:
            state.decoder_features.clear()  # gigabytes for a large video
        return made

    def forget(self, state: State) -> None:
        self._layouts.forget(state)
        for slot in state.cache_slots:
            if slot is not None:
                slot.clear()  # a state may live longer on one rank, in a traceback, and would count in its budget

    def release_memory(self) -> None:
        self._layouts.clear()
        self._adapters.release_memory()
        self.turns.release_memory()
        if self.capturer is not None:
            self.capturer.release()

    def drop_caches(self) -> None:
        self.release_memory()
        self._adapters.clear()
        for table in self._modulations:
            table.clear()
        for cache in self._prompt_caches:
            cache.clear()

    def movable_weights(self) -> list[Movable]:
        if self.turns.is_on:  # then `drop_caches` has made all components leave
            return []
        streamed = [] if self.layer_offload is None else self.layer_offload.streamed_tensors
        others = (MovableWeights(modules, self._device, streamed) for modules in self.components.values())
        return [*others, *([] if self.layer_offload is None else [self.layer_offload])]

    def grid(self, request: DiffusionRequest) -> Grid:
        """Numbers of latent frames, token rows and token columns of the request's picture or video."""
        side = self._info.pixels_per_token
        return self._info.latent_frames(request.num_frames), request.height // side, request.width // side
