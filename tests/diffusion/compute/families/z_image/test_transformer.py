"""Our packed transformer against diffusers', one pack against one forward a sequence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from testbed.tiny_z_image import tiny_z_image_transformer
from vllm_omni.diffusion.compute.attention import create_attention
from vllm_omni.diffusion.compute.attention.sharded import PackedAttention
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.families.z_image.config import ZImageConfig
from vllm_omni.diffusion.compute.families.z_image.transformer import (
    CHECKPOINT_NAMES,
    ZImageTransformer,
    padded_length,
)
from vllm_omni.diffusion.compute.packing import Pack
from vllm_omni.diffusion.compute.step.arrangement import Arrangement
from vllm_omni.diffusion.compute.step.modulation import ModulationTable
from vllm_omni.diffusion.compute.step.sampling import pack_latents
from vllm_omni.diffusion.compute.step.transformer import StepBlocks, StepContext
from vllm_omni.diffusion.compute.weights.loading import load_weights
from vllm_omni.errors import ConfigError

CPU = torch.device("cpu")


def load(path: Path, **config: object) -> ZImageTransformer:
    with torch.device("meta"):
        model = ZImageTransformer(ZImageConfig.from_dict(config), Group.alone())
    load_weights(model, path, CHECKPOINT_NAMES, CPU, torch.float32)
    return model


@torch.inference_mode()
def packed(
    model: ZImageTransformer,
    latents: list[torch.Tensor],
    captions: list[torch.Tensor],
    timesteps: list[float],
    grids: list[tuple[int, int]],
) -> list[torch.Tensor]:
    attention = PackedAttention(create_attention(), Group.alone(), Group.alone())
    texts = []
    for caption in captions:
        texts.append(model.refine_caption(caption, attention.over(Pack.build([padded_length(len(caption))], [0], CPU))))
    lengths = [padded_length(len(x)) for x in latents]
    pack = Pack.build([len(t) for t in texts], lengths, CPU)
    rotations = torch.cat([r for t, grid in zip(texts, grids) for r in model.rotations(len(t), grid)])
    modulation = ModulationTable(model.modulate, 2**20).rows_of(timesteps)
    context = StepContext(Arrangement(pack, rotations, attention), modulation)
    attend_images = attention.over(Pack.build([0] * len(latents), lengths, CPU))
    is_padding = torch.cat([torch.arange(n) >= len(x) for n, x in zip(lengths, latents)])[:, None]
    filled = torch.cat([F.pad(x, (0, 0, 0, n - len(x)), value=7.0) for n, x in zip(lengths, latents)])
    blocks = StepBlocks(model, context)
    hidden = model.embed(filled, torch.cat(texts), context, is_padding, attend_images)
    hidden = blocks.run(hidden, range(blocks.num_blocks))
    velocities = model.project(hidden, context).split(lengths)
    return [velocity[: len(x)] for velocity, x in zip(velocities, latents)]


@pytest.mark.parametrize("heads", [3, 5])
@pytest.mark.parametrize(
    "timesteps", [[0.9, 0.0, 0.5, 1.0, 0.9, 0.31], [0.7] * 6], ids=["own timesteps", "one timestep"]
)
def test_a_pack_equals_one_forward_a_sequence(tmp_path: Path, heads: int, timesteps: list[float]) -> None:
    torch.manual_seed(heads)
    theirs = tiny_z_image_transformer(heads=heads, layers=3)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path, **theirs.config)
    # Tokens: 16, 48, 15, 32 (nothing to fill up), 63, 2; captions up to positions where angles are large.
    grids = [(4, 4), (8, 6), (3, 5), (4, 8), (7, 9), (1, 2)]
    latents = [torch.randn(16, 1, 2 * h, 2 * w) for h, w in grids]
    captions = [torch.randn(n, 32) for n in (9, 32, 33, 9, 700, 1)]

    got = packed(ours, [pack_latents(x[:, 0], channels_last=True) for x in latents], captions, timesteps, grids)

    for i, velocity in enumerate(got):
        with torch.inference_mode():
            (want,) = theirs([latents[i]], torch.tensor([timesteps[i]]), [captions[i]], return_dict=False)[0]
        assert want.abs().max() > 0.5
        torch.testing.assert_close(velocity, pack_latents(want[:, 0], channels_last=True), atol=1e-4, rtol=1e-4)


def test_what_fills_up_takes_part(tmp_path: Path) -> None:
    theirs = tiny_z_image_transformer(heads=3)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path, **theirs.config)
    latents, caption = torch.randn(20, 64), torch.randn(6, 32)
    before = packed(ours, [latents], [caption], [0.4], [(4, 5)])[0]
    for token in (ours.x_pad_token, ours.cap_pad_token):
        kept = token.clone()
        token.neg_()
        assert (packed(ours, [latents], [caption], [0.4], [(4, 5)])[0] - before).abs().max() > 1e-3
        token.copy_(kept)


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"axes_dims \(4, 6, 6\) of 3 heads must add up to dim, 64"):
        ZImageConfig.from_dict({"axes_dims": (4, 6, 6), "n_heads": 3, "dim": 64})
