"""Compiled blocks do what they do uncompiled, and a few compilations serve packs of every size."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from testbed.tiny_models import tiny_transformer
from testbed.tiny_z_image import tiny_z_image_transformer
from tests.diffusion.compute.families.qwen_image import test_transformer as qwen_image
from tests.diffusion.compute.families.z_image import test_transformer as z_image
from vllm_omni.diffusion.compute.step.compiled import CompiledBlocks

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles for CPUs with g++")
# PyTorch's compiler imports modules of PyTorch that are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

Sequences = list[tuple[tuple[int, int], int, float]]
"""Grid of the picture, tokens of text, timestep."""


@dataclass(frozen=True)
class Family:
    """A way to two models of the same weights and to their velocities."""

    module: Any
    build: Callable[..., Any]
    latents: Callable[[int, int], Tensor]
    grid: Callable[[tuple[int, int]], Any]
    variants: int
    """Compilations of each part."""

    def models(self, path: Path) -> tuple[Any, Any]:
        torch.manual_seed(0)
        theirs = self.build(heads=3)
        theirs.save_pretrained(path)
        return self.module.load(path, **theirs.config), self.module.load(path, **theirs.config)

    def velocities(self, model: Any, sequences: Sequences, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        latents = [self.latents(*grid) for grid, _, _ in sequences]
        texts = [torch.randn(n, 32) for _, n, _ in sequences]
        timesteps, grids = [t for *_, t in sequences], [self.grid(grid) for grid, *_ in sequences]
        got: list[Tensor] = self.module.packed(model, latents, texts, timesteps, grids)
        return got

    def check(self, compiled: Any, eager: Any, sequences: Sequences, seed: int = 0) -> None:
        got, want = (self.velocities(model, sequences, seed) for model in (compiled, eager))
        for a, b in zip(got, want, strict=True):
            assert b.abs().max() > 0.1
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


FAMILIES = {
    # One sequence or several at one timestep; several at several.
    "qwen_image": Family(qwen_image, tiny_transformer, lambda h, w: torch.randn(h * w, 64), lambda grid: [grid], 3),
    # Tokens at one timestep or at several: one sequence is like many.
    "z_image": Family(z_image, tiny_z_image_transformer, lambda h, w: torch.randn(h * w, 64), lambda grid: grid, 2),
}


@pytest.fixture(params=["qwen_image", pytest.param("z_image", marks=pytest.mark.thorough)])
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def some_sequences(rng: random.Random) -> Sequences:
    one_timestep = rng.random() if rng.random() < 0.5 else None
    return [
        ((rng.randint(1, 9), rng.randint(2, 9)), rng.randint(2, 40), one_timestep or rng.random())
        for _ in range(rng.randint(1, 8))
    ]


@pytest.mark.thorough
def test_fifty_sizes_are_compiled_once_a_variant(family: Family, tmp_path: Path) -> None:
    compiled, eager = family.models(tmp_path)
    blocks = compiled.compile_blocks("aot_eager")
    rng = random.Random(0)
    for seed in range(50):
        family.check(compiled, eager, some_sequences(rng), seed)
    assert [part.num_compilations for part in blocks.parts] == [family.variants] * 2
    block, variants = family.module.__name__.split(".")[-2], f"({family.variants} variants)"
    name = {"qwen_image": "QwenImageBlock", "z_image": "ZImageBlock"}[block]
    assert str(blocks) == f"{name}.before {variants}, {name}.after {variants}"


@pytest.mark.thorough
@needs_compiler
def test_compiled_to_machine_code(family: Family, tmp_path: Path) -> None:
    compiled, eager = family.models(tmp_path)
    blocks = compiled.compile_blocks()
    for seed, sequences in enumerate(
        ([((4, 4), 9, 0.5), ((3, 7), 5, 0.2)], [((2, 3), 2, 0.7), ((5, 5), 31, 0.1), ((1, 2), 7, 0.7)])
    ):
        family.check(compiled, eager, sequences, seed)
    assert blocks.num_compilations == 2


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_a_rank_with_hardly_any_text_needs_no_code_of_its_own(num_tokens: int, tmp_path: Path) -> None:
    family = FAMILIES["qwen_image"]
    compiled, eager = family.models(tmp_path)
    blocks = compiled.compile_blocks("aot_eager")
    family.check(compiled, eager, [((4, 4), num_tokens, 0.5)])
    assert blocks.num_compilations == 0


class Doubling(nn.Module):
    def before(self, rows: Tensor, x: Tensor) -> Tensor:
        return rows[0] * x * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.before(torch.ones(1, 1, 1), x)


def test_compilations_are_logged_and_their_limit_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    block = Doubling()
    blocks = CompiledBlocks([block], ["before"], "eager")
    assert torch.equal(block(torch.ones(3, 1)), torch.full((3, 1), 2.0))
    blocks.end_warm_up()
    for width in range(2, 9):
        block(torch.ones(3, width))
    with pytest.raises(Exception, match="fullgraph"):
        block(torch.ones(3, 9))
    first, second, *_ = caplog.records
    assert (first.levelname, second.levelname) == ("INFO", "WARNING")
    assert "compiled variant 2 of Doubling.before" in second.getMessage()
    # Another model's blocks are not concerned.
    other = Doubling()
    CompiledBlocks([other], ["before"], "eager")
    assert torch.equal(other(torch.ones(3, 7)), torch.full((3, 7), 2.0))
