"""Our packed transformer against diffusers', one pack against one forward a sequence."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from testbed.tiny_wan import KINDS, LATENTS, LATENTS_5B, TEXT_DIM, TinyWan, tiny_wan_transformer
from tests.diffusion.compute.distributed.ranks import run_ranks
from tests.diffusion.compute.families.wan.packing import Video, load, make_videos, of_diffusers, packed, packed_on_rank
from tests.float8 import round_linears
from vllm_omni.diffusion.catalog.weight_files import stored_weights
from vllm_omni.diffusion.compute.families.wan.config import WanConfig
from vllm_omni.diffusion.compute.layers.kernels import create_kernels
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.errors import ConfigError

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles for CPUs with g++")
OWN = (999.0, 0.0, 531.5, 17.0)
SAME = (875.0,) * 4


def models(path: Path, kind: TinyWan, heads: int, layers: int = 3, dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' transformer of this kind, whose weights are in `path` too."""
    torch.manual_seed(heads)
    theirs = tiny_wan_transformer(
        heads=heads,
        layers=layers,
        in_channels=kind.in_channels,
        out_channels=LATENTS_5B if kind.is_5b else LATENTS,
        num_images=kind.sees_image,
    ).to(dtype)
    theirs.save_pretrained(path)
    return theirs


def videos_of(kind: TinyWan, timesteps: Sequence[float]) -> list[Video]:
    return make_videos(kind.in_channels, timesteps, kind.sees_image, kind.is_5b)


def assert_equal(got: Tensor, want: Tensor) -> None:
    assert want.abs().max() > 0.5
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["t2v-2.1", "i2v-2.1", "flf2v-2.1", "i2v-a14b", "i2v-5b"])
@pytest.mark.parametrize("heads", [3, 5])
@pytest.mark.parametrize("timesteps", [OWN, SAME], ids=["own timesteps", "one timestep"])
def test_a_pack_equals_one_forward_a_sequence(
    tmp_path: Path, name: str, heads: int, timesteps: Sequence[float]
) -> None:
    kind = KINDS[name]
    theirs = models(tmp_path, kind, heads)
    videos = videos_of(kind, timesteps)
    for velocity, video in zip(packed(load(tmp_path, theirs.config), videos), videos, strict=True):
        assert_equal(velocity, of_diffusers(theirs, video))


@pytest.mark.parametrize("name", ["i2v-2.1", "i2v-5b"])
@pytest.mark.parametrize("which", [(2, 0), (1,), (2,)])
def test_selected_sequences_keep_their_text_and_timestep(tmp_path: Path, name: str, which: tuple[int, ...]) -> None:
    kind = KINDS[name]
    theirs = models(tmp_path, kind, heads=3)
    videos = videos_of(kind, OWN)
    for velocity, number in zip(packed(load(tmp_path, theirs.config), videos, which), which, strict=True):
        assert_equal(velocity, of_diffusers(theirs, videos[number]))


@pytest.mark.parametrize(
    ("degrees", "name", "heads"),
    [
        ({"tensor_parallel_size": 2}, "i2v-2.1", 2),
        ({"tensor_parallel_size": 3}, "i2v-5b", 3),
        ({"ulysses_degree": 2}, "i2v-2.1", 3),
        ({"ring_degree": 2}, "i2v-5b", 5),
        ({"ulysses_degree": 2, "tensor_parallel_size": 2}, "t2v-2.1", 6),
        ({"ulysses_degree": 2, "ring_degree": 2}, "i2v-2.1", 3),
    ],
    ids=str,
)
def test_ranks_together_equal_one(tmp_path: Path, degrees: dict[str, int], name: str, heads: int) -> None:
    kind = KINDS[name]
    theirs = models(tmp_path, kind, heads)
    videos = videos_of(kind, OWN)
    parallel = DiffusionParallelConfig(**degrees)
    results = run_ranks(packed_on_rank, parallel, tmp_path, dict(theirs.config), videos)
    num_shards = parallel.ulysses_degree * parallel.ring_degree
    num_copies = len(results) // num_shards
    for number, video in enumerate(videos):
        want = of_diffusers(theirs, video)
        parts = [torch.from_numpy(result[number]) for result in results]
        # Tensor parallel ranks are neighbours, and each has the same shard.
        for copy in range(num_copies):
            assert_equal(torch.cat(parts[copy::num_copies]), want)


@pytest.mark.parametrize("name", ["t2v-2.1", "i2v-2.1"])
def test_padding_of_the_text_is_attended(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    ours = load(tmp_path, models(tmp_path, kind, heads=3).config)
    (video, *_) = videos_of(kind, OWN)
    shorter = replace(video, num_text_tokens=100)
    assert (packed(ours, [video])[0] - packed(ours, [shorter])[0]).abs().max() > 1e-3


@torch.inference_mode()
def test_padding_of_the_text_is_stored_as_one_token(tmp_path: Path) -> None:
    kind = KINDS["t2v-2.1"]
    ours = load(tmp_path, models(tmp_path, kind, heads=3).config)
    for text, stored in ((torch.randn(30, TEXT_DIM), 31), (torch.randn(512, TEXT_DIM), 512)):
        keys = ours.text_keys(text, 512)
        assert (keys.keys.shape[1], keys.num_tokens) == (stored, 512)
        assert [len(x) for x in keys.of_block(1, slice(None))] == [512, 512]


def test_fused_kernels_compute_the_same(tmp_path: Path) -> None:
    kind = KINDS["i2v-a14b"]
    theirs = models(tmp_path, kind, heads=3, layers=1)
    # Few tokens: without a GPU an interpreter runs the kernels.
    videos = [
        replace(video, latents=video.latents[:, :1, :2, : 2 + 2 * number], text=video.text[:5], num_text_tokens=5)
        for number, video in enumerate(videos_of(kind, OWN)[:2])
    ]
    fused = load(tmp_path, theirs.config, kernels=create_kernels("triton"))
    for velocity, video in zip(packed(fused, videos), videos, strict=True):
        assert_equal(velocity, of_diffusers(theirs, video))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.thorough, needs_compiler])]
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_blocks_compute_the_same_with_two_variants_of_each_part(tmp_path: Path, backend: str) -> None:
    """One row of modulation for all tokens, and several; packs of every size share them."""
    kind = KINDS["i2v-2.1"]
    theirs = models(tmp_path, kind, heads=3, layers=2)
    compiled, eager = load(tmp_path, theirs.config), load(tmp_path, theirs.config)
    blocks = compiled.compile_blocks(backend)
    for timesteps in (OWN, SAME):
        videos = videos_of(kind, timesteps)
        for some in (videos[:1], videos[1:]):
            for got, want in zip(packed(compiled, some), packed(eager, some), strict=True):
                assert_equal(got, want)
    assert [part.name for part in blocks.parts] == ["WanBlock.before", "WanBlock.between", "WanBlock.after"]
    assert [part.num_compilations for part in blocks.parts] == [2, 2, 2]


def test_float8_rounds_the_layers_of_the_blocks_that_run_at_every_step(tmp_path: Path) -> None:
    kind = KINDS["i2v-2.1"]
    # float64, where sums do not differ enough to fall on the other side of a rounding.
    theirs = models(tmp_path, kind, heads=3, dtype=torch.float64)
    videos = [video.double() for video in videos_of(kind, OWN)]
    ours, plain = (load(tmp_path, theirs.config, dtype=torch.float64, float8=float8) for float8 in (True, False))
    layers = r"^blocks\.\d+\.(attn1\.|ffn\.|attn2\.to_(q|out))"
    assert round_linears(theirs, layers) == 3 * (4 + 2 + 2)
    for got, unrounded, video in zip(packed(ours, videos), packed(plain, videos), videos, strict=True):
        want = of_diffusers(theirs, video)
        assert (unrounded - want).norm() > 0.003 * want.norm()
        assert_equal(got, want)


def test_a_weight_that_diffusers_ignores_is_not_read(tmp_path: Path) -> None:
    """Published image-to-video checkpoints have a norm of queries that no layer uses."""
    theirs = models(tmp_path, KINDS["i2v-2.1"], heads=3)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = dict(theirs.state_dict()) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(48)}
    file.parent.mkdir()
    save_file(weights, file)
    WanConfig.from_dict(theirs.config).expected_weights().check("transformer", stored_weights(file.parent))
    load(file.parent, theirs.config)


def test_modulation_is_in_float32_in_a_model_of_bfloat16(tmp_path: Path) -> None:
    theirs = models(tmp_path, KINDS["t2v-2.1"], heads=3)
    ours = load(tmp_path, theirs.config, dtype=torch.bfloat16)
    wanted = load(tmp_path, theirs.config).modulate(OWN)
    got = ours.modulate(OWN)
    assert got.blocks.dtype == got.final.dtype == torch.float32
    assert got.blocks.shape == (3, 1, 4, 6, 48)
    assert got.final.shape == (4, 2, 48)
    torch.testing.assert_close(got.blocks, wanted.blocks, atol=3e-2, rtol=2e-2)
    # The tables are not rounded: rows of two blocks differ exactly by their tables.
    tables = [block.scale_shift_table for block in theirs.blocks]
    torch.testing.assert_close(got.blocks[1, 0] - got.blocks[0, 0], (tables[1] - tables[0]).expand(4, -1, -1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention_head_dim": 15}, "attention_head_dim takes an even number, got 15"),
        ({"freq_dim": 63}, "freq_dim takes an even number, got 63"),
        ({"image_dim": 32}, "added_kv_proj_dim takes 48 with image_dim 32, got None"),
        ({"added_kv_proj_dim": 48}, "added_kv_proj_dim takes None with image_dim None, got 48"),
        ({"pos_embed_seq_len": 514}, "pos_embed_seq_len takes an even number with an image_dim, and null without"),
    ],
)
def test_sizes_that_do_not_fit_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WanConfig.from_dict({"num_attention_heads": 3, "attention_head_dim": 16} | values)
