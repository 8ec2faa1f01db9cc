"""Base of the packed families' transformers, and their blocks as step caches and captured graphs run them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.layers.kernels import Kernels, TorchKernels
from vllm_omni.diffusion.compute.offload.layer_offload import StreamedLayers
from vllm_omni.diffusion.compute.packing import Hidden, Pack, TokenRanges
from vllm_omni.diffusion.compute.step.adapters import PackAdapters
from vllm_omni.diffusion.compute.step.arrangement import Arrangement
from vllm_omni.diffusion.compute.step.compiled import Backend, CompiledBlocks
from vllm_omni.diffusion.compute.step.modulation import Modulation


@dataclass(frozen=True)
class StepContext:
    """Input that all blocks of one step share: the order of the tokens, and the modulation of their sequences."""

    arrangement: Arrangement
    modulation: Modulation
    adapters: PackAdapters | None = None
    """Adapters of the sequences; None: none has one."""

    def adapted(self) -> AbstractContextManager[None]:
        """Let the transformer's layers add the changes of the adapters in the meantime."""
        return nullcontext() if self.adapters is None else self.adapters.layers.applied()

    @property
    def pack(self) -> Pack:
        return self.arrangement.pack

    @property
    def text_index(self) -> Tensor | None:
        """int64 [T]: row of modulation of each text token; None: all have the only row."""
        return self.modulation.index(self.pack.text_sequence)

    @property
    def image_index(self) -> Tensor | None:
        """int64 [S]: row of modulation of each image token; None: all have the only row."""
        return self.modulation.index(self.arrangement.image_rows)

    def select(self, members: Sequence[int]) -> StepContext:
        """Context of some of the sequences, in order."""
        arrangement = self.arrangement.select(tuple(members))
        modulation = self.modulation
        if not self.arrangement.has_own_rows:  # which are no sequence's numbers, so that the rows keep their places
            modulation = modulation.of_members(arrangement.pack.numbers)
        adapters = None if self.adapters is None else self.adapters.select(tuple(members), arrangement.pack)
        return StepContext(arrangement, modulation, adapters)


class PackedTransformer(nn.Module, ABC):
    """Transformer on packed tokens. A step is the family's `embed`, then the blocks, then the family's `project`."""

    checkpoint_names: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """See `weight_targets`; also by which adapters name the layers."""
    trainer_names: ClassVar[Mapping[str, str]] = {}
    """Part of a layer's name in diffusers -> in the model's own code, whose names trainers of adapters use too; applied
    in order."""
    modulation_layers: ClassVar[tuple[str, ...]] = ("time_embedder", "modulation", "output_modulation")
    """Names of the layers, or of modules with layers, that `modulate` runs."""
    once_layers: ClassVar[tuple[str, ...]] = ()
    """Last names of the layers in blocks that a step does not run: those for a new timestep, or for a text."""
    compiled: CompiledBlocks | None = None
    """The blocks' compiled parts, if they are compiled."""
    kernels: Kernels = TorchKernels()
    """Operations between the layers' products, and the changes of layers by adapters."""
    tensor: Group
    """Ranks that share every layer by tensor parallelism."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """Blocks between `embed` and `project`, which a step cache may skip."""

    @property
    def compilable_blocks(self) -> Sequence[nn.Module]:
        """Blocks of one class that run at every step; each attends between its methods `before` and `after`."""
        return self.blocks

    @property
    def once_blocks(self) -> Sequence[nn.Module]:
        """Blocks that run for a text and at no step: none, unless overridden."""
        return ()

    @property
    def streamed_layers(self) -> StreamedLayers:
        """Layers whose weights may rest in host memory: see `LayerOffload`."""
        blocks = self.compilable_blocks
        once = [
            layer
            for name in self.once_layers
            for block in blocks
            for path, layer in block.named_modules()
            if path.rpartition(".")[2] == name
        ]
        return StreamedLayers(blocks, [*once, *self.once_blocks])

    @abstractmethod
    def modulate(self, conditions: Sequence[Any]) -> Modulation:
        """Rows of modulation of these conditions: hashable values, such as timesteps in [0, 1]."""

    @abstractmethod
    def run(self, hidden: Hidden, which: range, context: StepContext) -> Hidden:
        """Run consecutive blocks, those with the numbers `which`."""

    @abstractmethod
    def signal(self, hidden: Hidden, context: StepContext) -> Tensor:
        """[S, D]: image tokens after the first block's modulation, by which step caches compare steps."""

    def adapted_tokens(self, path: str, pack: Pack) -> TokenRanges:
        """Rows of the tokens that a step gives to the layer with this path: the image tokens, unless overridden."""
        return pack.image.ranges

    @property
    def compiled_parts(self) -> tuple[str, ...]:
        """Methods of a block to compile: those that hold no exchange between ranks."""
        return ("before", "after") if self.tensor.size == 1 else ("before",)

    def compile_blocks(
        self, backend: Backend = "inductor", *, others: Sequence[PackedTransformer] = ()
    ) -> CompiledBlocks:
        """Replace the `compiled_parts` of the blocks by compiled code; all else runs eagerly, such as attention.

        Compiles at the first run of each variant: one row of modulation or several, one sequence or several. others:
        transformers of the same class, which share the code.
        """
        transformers = (self, *others)
        blocks = [block for transformer in transformers for block in transformer.compilable_blocks]
        compiled = CompiledBlocks(blocks, self.compiled_parts, backend)
        for transformer in transformers:
            transformer.compiled = compiled
        return compiled


@dataclass(frozen=True)
class StepBlocks:
    """Blocks of a transformer over the sequences of one step: `cuda_graphs.CapturableBlocks`."""

    transformer: PackedTransformer
    context: StepContext

    @property
    def num_blocks(self) -> int:
        return len(self.transformer.blocks)

    @property
    def pack(self) -> Pack:
        return self.context.pack

    @property
    def rows(self) -> Tensor:
        return self.context.modulation.blocks

    def run(self, hidden: Hidden, which: range) -> Hidden:
        with self.context.adapted():
            return self.transformer.run(hidden, which, self.context)

    def signal(self, hidden: Hidden) -> Tensor:
        return self.transformer.signal(hidden, self.context)

    def with_rows(self, rows: Tensor) -> StepBlocks:
        modulation = replace(self.context.modulation, blocks=rows)
        return replace(self, context=replace(self.context, modulation=modulation))

    def select(self, members: Sequence[int]) -> StepBlocks:
        return replace(self, context=self.context.select(members))
