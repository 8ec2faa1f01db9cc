"""Our packed transformer against diffusers', one pack against one forward a sequence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from testbed.tiny_models import tiny_transformer
from vllm_omni.diffusion.compute.attention import create_attention
from vllm_omni.diffusion.compute.attention.sharded import PackedAttention
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.families.qwen_image.config import QwenImageConfig
from vllm_omni.diffusion.compute.families.qwen_image.transformer import (
    CHECKPOINT_NAMES,
    FLOAT8_LAYERS,
    QwenImageTransformer,
)
from vllm_omni.diffusion.compute.layers.kernels import Kernels, TorchKernels
from vllm_omni.diffusion.compute.packing import Pack
from vllm_omni.diffusion.compute.step.arrangement import Arrangement
from vllm_omni.diffusion.compute.step.modulation import ModulationTable
from vllm_omni.diffusion.compute.step.transformer import StepBlocks, StepContext
from vllm_omni.diffusion.compute.weights.loading import load_weights

CPU = torch.device("cpu")


def load(
    path: Path, kernels: Kernels | None = None, float8: tuple[str, ...] = (), **config: object
) -> QwenImageTransformer:
    with torch.device("meta"):
        model = QwenImageTransformer(QwenImageConfig.from_dict(config), Group.alone(), kernels)
    load_weights(model, path, CHECKPOINT_NAMES, CPU, torch.float32, float8=float8)
    return model


@torch.inference_mode()
def packed(
    model: QwenImageTransformer,
    latents: list[torch.Tensor],
    texts: list[torch.Tensor],
    timesteps: list[float],
    grids: list[list[tuple[int, int]]],
) -> list[torch.Tensor]:
    """grids: of each sequence, those of its target and of its references."""
    pack = Pack.build([len(t) for t in texts], [len(x) for x in latents], CPU)
    rotations = torch.cat([r for t, pictures in zip(texts, grids) for r in model.rotations(len(t), pictures)])
    attention = PackedAttention(create_attention(), Group.alone(), Group.alone())
    num_targets = [pictures[0][0] * pictures[0][1] for pictures in grids]
    is_target = torch.cat([torch.arange(len(x)) < n for x, n in zip(latents, num_targets)])
    image_rows = pack.image_sequence
    if model.config.zero_cond_t:
        image_rows = torch.where(is_target, image_rows, len(texts))
    modulation = ModulationTable(model.modulate, 2**20).rows_of([*timesteps, 0.0][: int(image_rows.max()) + 1])
    context = StepContext(Arrangement(pack, rotations, attention, image_rows), modulation)
    hidden = model.embed(torch.cat(latents), torch.cat([model.embed_text(t) for t in texts]))
    blocks = StepBlocks(model, context)
    return list(
        model.project(blocks.run(hidden, range(blocks.num_blocks)), context, is_target.nonzero()[:, 0]).split(
            num_targets
        )
    )


class Picking(TorchKernels):
    picks_rows = True


@pytest.mark.parametrize("float8", [(), FLOAT8_LAYERS], ids=["", "float8"])
def test_rows_picked_behind_the_output_projection_are_those_picked_before(
    tmp_path: Path, float8: tuple[str, ...]
) -> None:
    theirs = tiny_transformer(heads=3, head_dim=16, layers=3)
    theirs.save_pretrained(tmp_path)
    grids = [(4, 4), (8, 6), (3, 5)]
    arguments = (
        [torch.randn(h * w, 64) for h, w in grids],
        [torch.randn(n, 32) for n in (9, 40, 1)],
        [0.9, 0.02, 0.5],
        [[grid] for grid in grids],
    )
    models = [load(tmp_path, kernels, float8, **theirs.config) for kernels in (TorchKernels(), Picking())]
    for split, picked in zip(*(packed(model, *arguments) for model in models)):
        torch.testing.assert_close(picked, split, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("heads", [3, 5])
@pytest.mark.parametrize(
    "timesteps", [[0.9, 0.02, 0.5, 1.0, 0.9, 0.31], [0.7] * 6], ids=["own timesteps", "one timestep"]
)
def test_a_pack_equals_one_forward_a_sequence(tmp_path: Path, heads: int, timesteps: list[float]) -> None:
    torch.manual_seed(heads)
    theirs = tiny_transformer(heads=heads, head_dim=16, layers=3)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path, **theirs.config)
    grids = [(4, 4), (8, 6), (3, 5), (4, 4), (7, 9), (1, 2)]
    latents = [torch.randn(h * w, 64) for h, w in grids]
    texts = [torch.randn(n, 32) for n in (9, 12, 7, 9, 40, 1)]

    got = packed(ours, latents, texts, timesteps, [[grid] for grid in grids])

    for i, (rows, columns) in enumerate(grids):
        with torch.inference_mode():
            want = theirs(
                hidden_states=latents[i][None],
                encoder_hidden_states=texts[i][None],
                timestep=torch.tensor([timesteps[i]]),
                img_shapes=[[(1, rows, columns)]],
                return_dict=False,
            )[0][0]
        assert want.abs().max() > 0.5
        torch.testing.assert_close(got[i], want, atol=1e-4, rtol=1e-4)


def test_a_single_sequence_needs_no_gather(tmp_path: Path) -> None:
    theirs = tiny_transformer(heads=3)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path, **theirs.config)
    latents, text = torch.randn(20, 64), torch.randn(6, 32)

    (alone,) = packed(ours, [latents], [text], [0.4], [[(4, 5)]])
    in_company = packed(ours, [latents, latents + 1], [text, text], [0.4, 0.2], [[(4, 5)], [(5, 4)]])[0]

    assert Pack.build([6], [20], CPU).joint_order is None
    torch.testing.assert_close(alone, in_company, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("timesteps", [[0.9, 0.02, 0.9], [0.5] * 3], ids=["own timesteps", "one timestep"])
def test_reference_pictures_are_further_tokens_of_their_sequence(
    tmp_path: Path, zero_cond_t: bool, timesteps: list[float]
) -> None:
    torch.manual_seed(1)
    theirs = tiny_transformer(heads=5, layers=3, zero_cond_t=zero_cond_t)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path, **theirs.config)
    grids = [[(4, 4), (3, 5)], [(5, 3)], [(2, 7), (4, 4), (9, 1), (3, 3)]]
    latents = [torch.randn(sum(h * w for h, w in pictures), 64) for pictures in grids]
    texts = [torch.randn(n, 32) for n in (9, 12, 7)]

    got = packed(ours, latents, texts, timesteps, grids)

    for i, pictures in enumerate(grids):
        with torch.inference_mode():
            want = theirs(
                hidden_states=latents[i][None],
                encoder_hidden_states=texts[i][None],
                timestep=torch.tensor([timesteps[i]]),
                img_shapes=[[(1, *grid) for grid in pictures]],
            ).sample[0, : pictures[0][0] * pictures[0][1]]
        assert want.abs().max() > 0.5, "values near 0 would hide differences"
        torch.testing.assert_close(got[i], want, atol=1e-4, rtol=1e-4)
