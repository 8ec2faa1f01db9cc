"""Encode of a conditioning video by Wan 2.1's VAE, with random weights: in one call of diffusers, and piece by piece.

python -m benchmarks.video_encode_pieces --out out/pieces
python -m benchmarks.video_encode_pieces --tiny --out out/pieces    # the same code, small, on any machine

Writes `video_encode_pieces.json` into the folder, and prints it. Seconds are medians over the latent frames of a video.
`decode_frame_seconds` is the measure by which pieces of an encode are priced.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from benchmarks.timing import here, release_memory, synchronize
from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup
from vllm_omni.diffusion.compute.families.wan.vae import ConditioningVideo, WanDecoder, WanEncoder
from vllm_omni.diffusion.compute.step.pipeline import DecoderFeatures

SIZES = {"480p": (480, 832), "720p": (720, 1280)}
"""Height and width in pixels of the sizes that the published models make."""
NUM_FRAMES = 81
TINY_SIZES = {"tiny": (32, 48)}
TINY_FRAMES = 9
TINY_VAE = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


@torch.inference_mode()
def measure(vae: AutoencoderKLWan, height: int, width: int, num_frames: int) -> dict[str, Any]:
    """Seconds and bytes of the encode of one video, and of the decode of its latent frames."""
    device, first = vae.device, np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    num_latent_frames = 1 + (num_frames - 1) // 4
    encoder = WanEncoder(vae)
    ConditioningVideo(encoder, min(9, num_frames), first).finish()  # kernels are chosen at the first calls
    release_memory(device)
    video = ConditioningVideo(encoder, num_frames, first)
    pieces = [_seconds(lambda end=end: video.advance(end), device) for end in range(1, num_latent_frames)]  # type: ignore[misc]  # end is bound
    kept = video.feature_bytes
    pieces.append(_seconds(video.finish, device))
    peak = _peak_bytes(device)
    latents = video.finish()
    release_memory(device)
    whole: list[torch.Tensor] = []
    seconds = _seconds(lambda: whole.append(_encode_by_diffusers(vae, first, num_frames)), device)
    difference = float((encoder.normalize(whole[0]) - latents).abs().max())
    whole_peak = _peak_bytes(device)
    release_memory(device)
    return {
        "latent_frames": num_latent_frames,
        "piece_seconds": statistics.median(pieces[1:]),
        "longest_piece_seconds": max(pieces),
        "pieces_seconds": sum(pieces),
        "whole_seconds": seconds,
        "largest_difference": difference,
        "kept_bytes_between_pieces": kept,
        "peak_bytes_pieces": peak,
        "peak_bytes_whole": whole_peak,
        "decode_frame_seconds": statistics.median(_decode_seconds(vae, latents)[1:]),
    }


def _decode_seconds(vae: AutoencoderKLWan, latents: torch.Tensor) -> list[float]:
    """Seconds of the decode of each latent frame."""
    channels, frames, rows, columns = latents.shape
    decoder, grid = WanDecoder(vae, False, DecodeGroup.alone()), (frames, rows // 2, columns // 2)
    features: DecoderFeatures = {}
    tokens = torch.randn(math.prod(grid), 4 * channels, device=latents.device)
    return [
        _seconds(lambda n=n: decoder.decode_next(tokens, grid, range(n, n + 1), features), latents.device)  # type: ignore[misc]  # n is bound
        for n in range(frames)
    ]


def _encode_by_diffusers(vae: AutoencoderKLWan, first: np.ndarray, num_frames: int) -> torch.Tensor:
    video = torch.zeros((1, 3, num_frames, *first.shape[:2]), device=vae.device)
    video[0, :, 0] = (torch.from_numpy(first).permute(2, 0, 1).float() / 255 * 2 - 1).to(vae.device)
    mode: torch.Tensor = vae.encode(video).latent_dist.mode()
    return mode


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    with here():
        vae = AutoencoderKLWan(**(TINY_VAE if args.tiny else {}))
    vae.eval().requires_grad_(False)
    num_frames = TINY_FRAMES if args.tiny else NUM_FRAMES
    rows = {name: measure(vae, *size, num_frames) for name, size in (TINY_SIZES if args.tiny else SIZES).items()}
    text = json.dumps(rows, indent=2)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "video_encode_pieces.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
