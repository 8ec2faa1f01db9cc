"""The contract of `PackedTransformer` carries more than today's families need, shown by a toy transformer.

The toy's modulation depends on timestep, guidance scale and pooled text; all blocks share it; double-stream blocks come
before single-stream ones; and image tokens of one sequence may have a timestep of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testbed.tiny_models import randomize
from vllm_omni.diffusion.compute.attention import create_attention
from vllm_omni.diffusion.compute.attention.sharded import PackedAttention
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.packing import Hidden, Pack
from vllm_omni.diffusion.compute.step.arrangement import Arrangement
from vllm_omni.diffusion.compute.step.modulation import Modulation, ModulationTable, per_token
from vllm_omni.diffusion.compute.step.transformer import PackedTransformer, StepBlocks, StepContext

CPU = torch.device("cpu")
HEADS, WIDTH, POOLED = 2, 16, 5
TEXT, IMAGE = 0, 1
NUM_DOUBLE, NUM_SINGLE = 2, 2
TEXT_LENGTHS, IMAGE_LENGTHS = (3, 1, 5), (6, 9, 4)


@dataclass(eq=False)
class PooledText:
    """Pooled text of one request, compared by identity."""

    values: Tensor


class ToyCondition(NamedTuple):
    timestep: float
    guidance: float
    pooled: PooledText


class ToyBlock(nn.Module):
    """Modulated attention with a gated residual; for one kind of token, or for both."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def before(self, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
        shift, scale, _ = parts
        qkv: Tensor = self.qkv(x * scale + shift)
        return qkv

    def after(self, x: Tensor, attended: Tensor, parts: Sequence[Tensor]) -> Tensor:
        added: Tensor = parts[2] * self.out(attended)
        return x + added


class ToyTransformer(PackedTransformer):
    def __init__(self) -> None:
        super().__init__()
        self.tensor = Group.alone()
        self.condition = nn.Linear(2 + POOLED, WIDTH)
        self.modulation = nn.Linear(WIDTH, 2 * 3 * WIDTH)
        self.double_blocks = nn.ModuleList(nn.ModuleList([ToyBlock(), ToyBlock()]) for _ in range(NUM_DOUBLE))
        self.single_blocks = nn.ModuleList(ToyBlock() for _ in range(NUM_SINGLE))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [*self.double_blocks, *self.single_blocks]

    def streams(self, number: int) -> tuple[ToyBlock, ToyBlock]:
        """The parts of a block for text and for image; a single-stream block is both."""
        block = self.blocks[number]
        one, other = block if isinstance(block, nn.ModuleList) else (block, block)
        assert isinstance(one, ToyBlock)
        assert isinstance(other, ToyBlock)
        return one, other

    def modulate(self, conditions: Sequence[ToyCondition]) -> Modulation:
        inputs = [torch.cat((torch.tensor([c.timestep, c.guidance]), c.pooled.values)) for c in conditions]
        rows = self.modulation(torch.tanh(self.condition(torch.stack(inputs)))).unflatten(-1, (2, 3, WIDTH))
        return Modulation(blocks=rows.transpose(0, 1)[None], final=rows[:, IMAGE])

    def run(self, hidden: Hidden, which: range, context: StepContext) -> Hidden:
        pack, text, image = context.pack, hidden.text, hidden.image
        (rows,) = context.modulation.blocks
        parts = per_token(rows[TEXT], context.text_index), per_token(rows[IMAGE], context.image_index)
        for number in which:
            one, other = self.streams(number)
            qkv = pack.join(one.before(text, parts[TEXT]), other.before(image, parts[IMAGE]))
            attended = context.arrangement.attend(*qkv.unflatten(-1, (3, HEADS, -1)).unbind(1)).flatten(1)
            of_text, of_image = pack.split(attended)
            text, image = one.after(text, of_text, parts[TEXT]), other.after(image, of_image, parts[IMAGE])
        return Hidden(text, image)

    def signal(self, hidden: Hidden, context: StepContext) -> Tensor:
        shift, scale, _ = per_token(context.modulation.blocks[0, IMAGE], context.image_index)
        return hidden.image * scale + shift

    def alone(self, text: Tensor, image: Tensor, conditions: Sequence[ToyCondition]) -> Tensor:
        """The image tokens of one sequence after all blocks, in plain PyTorch. conditions: of each image token; the
        text has that of the first."""
        rows = torch.stack([self.modulate([condition]).blocks[0, :, 0] for condition in conditions], dim=1)
        of_text, of_image = rows[TEXT, 0].unbind(0), rows[IMAGE].unbind(1)
        for number in range(len(self.blocks)):
            one, other = self.streams(number)
            qkv = torch.cat((one.before(text, of_text), other.before(image, of_image)))
            q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(1, 2, 0, 3)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
            text = one.after(text, attended[: len(text)], of_text)
            image = other.after(image, attended[len(text) :], of_image)
        return image


@dataclass(frozen=True)
class Case:
    """Three sequences; half of the image tokens of the second one have the condition `own` where `has_own`."""

    model: ToyTransformer
    texts: list[Tensor]
    images: list[Tensor]
    conditions: list[ToyCondition]
    own: ToyCondition
    has_own: bool

    def blocks(self) -> StepBlocks:
        pack = Pack.build(TEXT_LENGTHS, IMAGE_LENGTHS, CPU)
        attention = PackedAttention(create_attention(), Group.alone(), Group.alone())
        rotations, image_rows, conditions = torch.zeros(pack.num_tokens), None, self.conditions
        if self.has_own:
            image_rows, conditions = pack.image_sequence.clone(), [*self.conditions, self.own]
            image_rows[IMAGE_LENGTHS[0] :][: self.num_own] = len(self.conditions)
        table: ModulationTable[ToyCondition] = ModulationTable(self.model.modulate, 2**20)
        return StepBlocks(
            self.model, StepContext(Arrangement(pack, rotations, attention, image_rows), table.rows_of(conditions))
        )

    @property
    def num_own(self) -> int:
        return IMAGE_LENGTHS[1] // 2 if self.has_own else 0

    def wanted(self, number: int) -> Tensor:
        of_tokens = [self.conditions[number]] * IMAGE_LENGTHS[number]
        if number == 1:
            of_tokens[: self.num_own] = [self.own] * self.num_own
            if self.has_own:  # its text keeps the sequence's condition: see below
                return self._second(of_tokens)
        return self.model.alone(self.texts[number], self.images[number], of_tokens)

    def _second(self, of_tokens: list[ToyCondition]) -> Tensor:
        """`alone` gives the text the first token's condition, so the tokens go in with their own ones last."""
        order = [*range(self.num_own, len(of_tokens)), *range(self.num_own)]
        image = self.model.alone(self.texts[1], self.images[1][order], [of_tokens[i] for i in order])
        return image[torch.tensor(order).argsort()]


@pytest.fixture(params=[False, True], ids=["a condition a sequence", "a condition a token"])
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    model = ToyTransformer()
    randomize(model)
    pooled = [PooledText(torch.randn(POOLED)) for _ in range(3)]
    # The same timestep everywhere: guidance and pooled text alone make the rows differ.
    conditions = [ToyCondition(0.5, guidance, text) for guidance, text in zip((1.0, 3.0, 3.0), pooled)]
    return Case(
        model,
        [torch.randn(n, WIDTH) for n in TEXT_LENGTHS],
        [torch.randn(n, WIDTH) for n in IMAGE_LENGTHS],
        conditions,
        own=ToyCondition(0.0, 3.0, pooled[1]),
        has_own=request.param,
    )


def hidden_of(case: Case, members: Sequence[int]) -> Hidden:
    return Hidden(torch.cat([case.texts[i] for i in members]), torch.cat([case.images[i] for i in members]))


@torch.inference_mode()
def test_a_pack_equals_each_sequence_alone(case: Case) -> None:
    blocks = case.blocks()
    assert blocks.num_blocks == NUM_DOUBLE + NUM_SINGLE
    images = blocks.run(hidden_of(case, range(3)), range(blocks.num_blocks)).image.split(IMAGE_LENGTHS)
    wanted = [case.wanted(i) for i in range(3)]
    for image, want in zip(images, wanted, strict=True):
        assert want.abs().mean() > 0.1
        torch.testing.assert_close(image, want, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("members", [(1,), (0, 2), (1, 2)])
def test_some_sequences_go_on_alone_between_double_and_single_blocks(case: Case, members: tuple[int, ...]) -> None:
    blocks = case.blocks()
    middle = blocks.run(hidden_of(case, range(3)), range(NUM_DOUBLE))
    part = Hidden.packed([blocks.pack.sequences(middle)[i] for i in members])
    images = blocks.select(members).run(part, range(NUM_DOUBLE, blocks.num_blocks)).image
    for image, i in zip(images.split([IMAGE_LENGTHS[i] for i in members]), members, strict=True):
        torch.testing.assert_close(image, case.wanted(i), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_blocks_read_their_modulation_from_the_rows_that_they_are_given(case: Case) -> None:
    blocks = case.blocks()
    hidden = hidden_of(case, range(3))
    same = blocks.with_rows(torch.zeros_like(blocks.rows)).run(hidden, range(blocks.num_blocks))
    assert torch.equal(same.image, hidden.image), "a gate of zero"
