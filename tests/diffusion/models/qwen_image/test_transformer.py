"""Our packed transformer against diffusers', one pack against one forward a sequence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_transformer
from vllm_omni.diffusion.attention import create_attention
from vllm_omni.diffusion.attention.sharded import PackedAttention
from vllm_omni.diffusion.distributed.groups import Group
from vllm_omni.diffusion.models.arrangement import Arrangement
from vllm_omni.diffusion.models.loading import load_weights
from vllm_omni.diffusion.models.modulation import ModulationTable
from vllm_omni.diffusion.models.qwen_image.transformer import (
    CHECKPOINT_NAMES,
    QwenImageTransformer,
    StepBlocks,
    StepContext,
    TransformerConfig,
)
from vllm_omni.diffusion.packing import Pack

CPU = torch.device("cpu")


def load(path: Path, **config: object) -> QwenImageTransformer:
    with torch.device("meta"):
        model = QwenImageTransformer(TransformerConfig.from_dict(config), Group.alone())
    load_weights(model, path, CHECKPOINT_NAMES, CPU, torch.float32)
    return model


@torch.inference_mode()
def packed(
    model: QwenImageTransformer,
    latents: list[torch.Tensor],
    texts: list[torch.Tensor],
    timesteps: list[float],
    grids: list[tuple[int, int]],
) -> list[torch.Tensor]:
    pack = Pack.build([len(t) for t in texts], [len(x) for x in latents], CPU)
    rotations = torch.cat([r for t, grid in zip(texts, grids) for r in model.rotations(len(t), grid)])
    attention = PackedAttention(create_attention(), Group.alone(), Group.alone())
    modulation = ModulationTable(model.modulate, 2**20).rows_of(timesteps)
    context = StepContext(Arrangement(pack, rotations, attention), modulation)
    hidden = model.embed(torch.cat(latents), torch.cat([model.embed_text(t) for t in texts]))
    blocks = StepBlocks(model, context)
    return list(model.project(blocks.run(hidden, range(blocks.num_blocks)), context).split(pack.image.lengths))


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

    got = packed(ours, latents, texts, timesteps, grids)

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

    (alone,) = packed(ours, [latents], [text], [0.4], [(4, 5)])
    in_company = packed(ours, [latents, latents + 1], [text, text], [0.4, 0.2], [(4, 5), (5, 4)])[0]

    assert Pack.build([6], [20], CPU).joint_order is None
    torch.testing.assert_close(alone, in_company, atol=1e-5, rtol=1e-5)
