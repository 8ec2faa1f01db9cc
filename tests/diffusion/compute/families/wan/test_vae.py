"""Wan's VAE piece by piece and by several ranks, against diffusers' AutoencoderKLWan in one call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from tests.diffusion.compute.distributed.ranks import run_ranks
from tests.diffusion.compute.vae.memory import FakeMemory
from tests.fake_gpu import FAKE_GPU, FakeGpu
from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup
from vllm_omni.diffusion.compute.distributed.mesh import World
from vllm_omni.diffusion.compute.families.wan.vae import ConditioningVideo, WanDecoder, WanEncoder
from vllm_omni.diffusion.compute.step.pipeline import DecoderFeatures
from vllm_omni.diffusion.compute.step.sampling import pack_latents
from vllm_omni.diffusion.compute.vae.tile_choice import TileChoice
from vllm_omni.diffusion.data import DiffusionParallelConfig

CHANNELS = 4
HIGH_COMPRESSION = {
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
"""Differences of the VAE of TI2V-5B from that of Wan 2.1, at a small size."""
KINDS = pytest.mark.parametrize("further", [{}, HIGH_COMPRESSION], ids=["wan21", "high compression"])
Grid = tuple[int, int, int]


pytestmark = pytest.mark.usefixtures("module_on_one_thread")


def make_vae(further: dict[str, Any], tiled: bool = False) -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.4],
        latents_std=[1.5, 2.0, 0.7, 1.1],
        **further,
    )
    if tiled:
        side: int = vae.spatial_compression_ratio
        # 4 x 6 latent pixels, which overlap by 1 downwards and 2 to the right.
        vae.enable_tiling(4 * side, 6 * side, 3 * side, 4 * side)
    return vae.eval().requires_grad_(False)


def token_latents(grid: Grid, seed: int) -> Tensor:
    """[frames * rows * columns, channels * 4]: frame after frame, as in `FlowState`."""
    frames, rows, columns = grid
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn((frames, CHANNELS, 2 * rows, 2 * columns), generator=generator)
    return torch.cat([pack_latents(frame) for frame in z])


def by_diffusers(vae: AutoencoderKLWan, grid: Grid, seed: int) -> np.ndarray:
    """uint8 [frames, height, width, 3] as WanPipeline makes them in one call."""
    frames, rows, columns = grid
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn((frames, CHANNELS, 2 * rows, 2 * columns), generator=generator).transpose(0, 1)[None]
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    video = vae.decode(z / (1.0 / std) + mean, return_dict=False)[0]
    values: np.ndarray = VideoProcessor().postprocess_video(video, output_type="np")[0]
    return (values * 255).round().astype(np.uint8)


def decode_piece(decode: WanDecoder, grid: Grid, seed: int, part: slice, features: DecoderFeatures) -> Any:
    return decode.decode_next(token_latents(grid, seed), grid, range(part.start, part.stop), features)


def in_pieces(decode: WanDecoder, grid: Grid, seed: int, cuts: Sequence[int]) -> np.ndarray | None:
    features: DecoderFeatures = {}
    pieces = [decode_piece(decode, grid, seed, slice(*cut), features) for cut in pairwise(cuts)]
    return None if pieces[0] is None else np.concatenate([piece.pixels.numpy() for piece in pieces])


@KINDS
@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
def test_pieces_of_several_videos_in_turns_are_the_video_of_one_call(further: dict[str, Any], tiled: bool) -> None:
    vae = make_vae(further, tiled)
    wide, tall = (3, 2, 4), (3, 2, 1)
    wanted = [by_diffusers(vae, wide, 1), by_diffusers(vae, tall, 2)]
    decode = WanDecoder(vae, tiled, DecodeGroup.alone())
    kept: list[DecoderFeatures] = [{}, {}]
    first = [decode_piece(decode, wide, 1, slice(0, 1), kept[0])]
    second = [decode_piece(decode, tall, 2, slice(0, 2), kept[1])]
    first.append(decode_piece(decode, wide, 1, slice(1, 3), kept[0]))
    second.append(decode_piece(decode, tall, 2, slice(2, 3), kept[1]))
    assert [len(piece.pixels) for piece in (*first, *second)] == [1, 8, 5, 4]
    for pieces, video in zip((first, second), wanted, strict=True):
        assert (np.concatenate([piece.pixels.numpy() for piece in pieces]) == video).all()
    assert len(kept[0]) == (4 if tiled else 1)


@KINDS
def test_a_call_decodes_pictures_and_whole_videos(further: dict[str, Any]) -> None:
    vae, grids = make_vae(further), [(1, 2, 3), (2, 1, 2)]
    wanted = [by_diffusers(vae, grid, seed) for seed, grid in enumerate(grids)]
    decode = WanDecoder(vae, False, DecodeGroup.alone())
    picture, video = decode([token_latents(grid, seed) for seed, grid in enumerate(grids)], grids)
    side = 2 * vae.spatial_compression_ratio
    assert picture.pixels.shape == (2 * side, 3 * side, 3)
    assert video.pixels.shape == (5, side, 2 * side, 3)
    assert (picture.pixels.numpy() == wanted[0][0]).all()
    assert (video.pixels.numpy() == wanted[1]).all()


def test_values_that_are_not_finite_show_in_their_piece() -> None:
    decode, grid = WanDecoder(make_vae({}), False, DecodeGroup.alone()), (3, 1, 1)
    tokens = token_latents(grid, 0)
    features: DecoderFeatures = {}
    assert decode.decode_next(tokens, grid, range(1), features).is_finite  # type: ignore[union-attr]
    tokens[1, 3] = torch.inf
    for frame in (1, 2):  # later frames depend on it
        assert not decode.decode_next(tokens, grid, range(frame, frame + 1), features).is_finite  # type: ignore[union-attr]


def decode_on_rank(world: World, further: dict[str, Any], grid: Grid) -> tuple[np.ndarray | None, int]:
    decode = WanDecoder(make_vae(further, tiled=True), False, world.mesh.vae)
    return in_pieces(decode, grid, 3, (0, 1, 2)), world.sent["all_to_all"]


@KINDS
def test_ranks_share_the_tiles_of_each_piece(further: dict[str, Any]) -> None:
    grid = (2, 2, 4)  # four tiles of 4 x 8 latent pixels
    wanted = by_diffusers(make_vae(further, tiled=True), grid, 3)
    shared = DiffusionParallelConfig(ulysses_degree=2, vae_patch_parallel_size=2)
    (video, _), (nothing, num_bytes) = run_ranks(decode_on_rank, shared, further, grid)
    assert (video == wanted).all()
    assert nothing is None
    assert num_bytes > 0


@KINDS
@torch.inference_mode()
def test_the_host_waits_for_neither_frames_nor_latents(further: dict[str, Any]) -> None:
    grid, gpu, picture = (2, 1, 4), FakeGpu(), np.full((32, 32, 3), 99, np.uint8)
    vae = make_vae(further, tiled=True)
    wanted = (
        in_pieces(WanDecoder(vae, True, DecodeGroup.alone()), grid, 1, (0, 1, 2)),
        ConditioningVideo(WanEncoder(vae), 5, picture).finish(),
    )
    with gpu:
        with gpu.waiting_allowed():
            vae = make_vae(further, tiled=True).to(FAKE_GPU)
            decode, encode = WanDecoder(vae, True, DecodeGroup.alone()), WanEncoder(vae)
        features: DecoderFeatures = {}
        tokens = to_device(token_latents(grid, 1), FAKE_GPU)
        pieces = [decode.decode_next(tokens, grid, range(frame, frame + 1), features) for frame in range(2)]
        latents = ConditioningVideo(encode, 5, picture).finish()
        with gpu.waiting_allowed():
            made = np.concatenate([piece.pixels.cpu().numpy() for piece in pieces if piece is not None]), latents.cpu()
    assert (made[0] == wanted[0]).all()
    assert torch.equal(made[1], wanted[1])


@pytest.mark.parametrize(
    ("further", "tiled", "has_last"),
    [
        pytest.param({}, True, True, id="wan21, tiled, first and last"),
        pytest.param(HIGH_COMPRESSION, False, False, id="high compression"),
        pytest.param({}, False, True, id="wan21, first and last", marks=pytest.mark.thorough),
        pytest.param(HIGH_COMPRESSION, True, False, id="high compression, tiled", marks=pytest.mark.thorough),
    ],
)
def test_pieces_of_encodes_in_turns_are_the_encode_of_one_call(
    further: dict[str, Any], tiled: bool, has_last: bool
) -> None:
    vae = make_vae(further, tiled)
    encoder, pictures = WanEncoder(vae), [input_pictures(vae, seed)[: 1 + has_last] for seed in (0, 1)]
    wanted = [encoded_by_diffusers(vae, 9, *its) for its in pictures]
    assert wanted[0].std() > 0.02, "a flat video proves nothing"
    first, second, at_once = (ConditioningVideo(encoder, 9, *its) for its in (*pictures, pictures[0]))
    first.advance(1)
    second.advance(2)
    first.advance(2)
    assert first.feature_bytes > 0
    first.advance(3)
    assert first.feature_bytes == 0
    assert torch.equal(second.finish(), wanted[1])
    assert torch.equal(first.finish(), wanted[0])
    assert torch.equal(at_once.finish(), wanted[0])


@KINDS
def test_a_picture_is_encoded_as_in_the_pipeline(further: dict[str, Any]) -> None:
    vae = make_vae(further)
    picture = input_pictures(vae, 0)[0]
    assert torch.equal(ConditioningVideo(WanEncoder(vae), 1, picture).finish(), encoded_by_diffusers(vae, 1, picture))


def test_an_encode_that_failed_begins_again() -> None:
    """Another request with the same pictures goes on with it."""
    vae, (first, last) = make_vae({}), input_pictures(make_vae({}), 0)
    encoding = ConditioningVideo(WanEncoder(vae), 9, first, last)
    encoding.advance(1)
    forward = vae.encoder.mid_block.forward
    vae.encoder.mid_block.forward = fail  # some features are of the second latent frame, others are not
    with pytest.raises(RuntimeError, match="no room"):
        encoding.advance(2)
    vae.encoder.mid_block.forward = forward
    assert encoding.feature_bytes == 0
    encoding.advance(2)
    assert torch.equal(encoding.finish(), encoded_by_diffusers(vae, 9, first, last))


def fail(*args: Any, **keywords: Any) -> None:
    raise RuntimeError("no room")


def input_pictures(vae: AutoencoderKLWan, seed: int) -> np.ndarray:
    """uint8 [2, height, width, 3], of 4 x 8 latent pixels: four tiles in a VAE that is tiled."""
    side: int = vae.spatial_compression_ratio
    return np.random.default_rng(seed).integers(0, 256, (2, 4 * side, 8 * side, 3), dtype=np.uint8)


def encoded_by_diffusers(
    vae: AutoencoderKLWan, num_frames: int, first: np.ndarray, last: np.ndarray | None = None
) -> Tensor:
    """Latents [channels, latent frames, height, width] as WanImageToVideoPipeline makes them in one call."""
    video = torch.zeros(1, 3, num_frames, *first.shape[:2])
    video[0, :, 0] = torch.from_numpy(first).permute(2, 0, 1) / 255 * 2 - 1
    if last is not None:
        video[0, :, -1] = torch.from_numpy(last).permute(2, 0, 1) / 255 * 2 - 1
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    latents: Tensor = (vae.encode(video).latent_dist.mode() - mean) * (1.0 / std)
    return latents[0]


def choice_with(memory: FakeMemory, least_free_bytes: int | None = None) -> TileChoice:
    choice = TileChoice(lambda height, width, num_frames: 1000)
    choice.watch(memory, least_free_bytes)
    return choice


@KINDS
@pytest.mark.parametrize("runs_out", [False, True], ids=["does not fit", "runs out"])
def test_a_video_that_does_not_fit_is_decoded_in_tiles(
    further: dict[str, Any], runs_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that runs out of memory at its third latent frame: tiles begin there, with the features of a tiled video."""
    grid, vae = (4, 2, 4), make_vae(further, tiled=True)
    wanted = in_pieces(WanDecoder(vae, True, DecodeGroup.alone()), grid, 1, (0, 1, 2, 3, 4))
    vae.use_tiling = False
    whole = in_pieces(WanDecoder(vae, False, DecodeGroup.alone()), grid, 1, (0, 1, 2, 3, 4))
    assert wanted is not None
    assert whole is not None
    memory, calls, original = FakeMemory(2000 if runs_out else 1000), [0], vae.decoder.forward
    decode = WanDecoder(vae, False, DecodeGroup.alone(), choice_with(memory))

    def forward(x: Tensor, **rest: Any) -> Tensor:
        out: Tensor = original(x, **rest)
        calls[0] += 1
        if runs_out and calls[0] == 3:  # after the features have changed
            raise torch.OutOfMemoryError("no room")
        return out

    monkeypatch.setattr(vae.decoder, "forward", forward)
    features: DecoderFeatures = {}
    pieces = [decode_piece(decode, grid, 1, slice(n, n + 1), features) for n in range(4)]
    made = np.concatenate([piece.pixels.numpy() for piece in pieces])
    first = 5 if runs_out else 0
    assert (made[:first] == whole[:first]).all()
    assert (made[first:] == wanted[first:]).all()
    assert (made != whole).any()
    assert [piece.is_tiled for piece in pieces] == [not runs_out, not runs_out, True, True]
    assert len(features) > 1
    assert memory.num_releases == runs_out


@KINDS
@pytest.mark.parametrize("runs_out", [False, True], ids=["does not fit", "runs out"])
def test_input_pictures_that_do_not_fit_are_encoded_in_tiles(
    further: dict[str, Any], runs_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (160, 192, 3) if further else (64, 64, 3)  # larger than a tile, in patches
    vae, picture = make_vae(further, tiled=True), np.random.default_rng(0).integers(0, 256, size, np.uint8)
    wanted = ConditioningVideo(WanEncoder(vae), 9, picture).finish()
    vae.use_tiling = False
    whole = ConditioningVideo(WanEncoder(vae), 9, picture).finish()
    assert not torch.equal(whole, wanted)
    memory, calls, original = FakeMemory(2000 if runs_out else 1000), [0], vae.encoder.forward

    def forward(x: Tensor, **rest: Any) -> Tensor:
        calls[0] += 1
        if runs_out and calls[0] == 2:
            raise torch.OutOfMemoryError("no room")
        out: Tensor = original(x, **rest)
        return out

    monkeypatch.setattr(vae.encoder, "forward", forward)
    assert torch.equal(ConditioningVideo(WanEncoder(vae, choice_with(memory)), 9, picture).finish(), wanted)
    assert memory.num_releases == runs_out


def test_several_ranks_choose_by_what_all_of_them_know() -> None:
    """Their latents must be alike: neither the memory that is free now counts, nor an error on one rank."""
    vae, picture = make_vae({}, tiled=True), np.full((64, 128, 3), 99, np.uint8)
    wanted = ConditioningVideo(WanEncoder(vae), 5, picture).finish()
    vae.use_tiling = False
    whole = ConditioningVideo(WanEncoder(vae), 5, picture).finish()
    for free_now in (0, 2**40):
        for least, expected in ((1000, wanted), (10_000, whole)):
            encoder = WanEncoder(vae, choice_with(FakeMemory(free_now), least))
            assert torch.equal(ConditioningVideo(encoder, 5, picture).finish(), expected)
    vae.encoder.forward = raise_out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        ConditioningVideo(WanEncoder(vae, choice_with(FakeMemory(0), 10_000)), 5, picture).finish()


def raise_out_of_memory(*args: Any, **rest: Any) -> Tensor:
    raise torch.OutOfMemoryError("no room")
