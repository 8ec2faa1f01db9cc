"""Train the video model from random weights and save it as a WanPipeline folder.

    python -m tools.demo_model.drawings --cache .demo-data
    python -m tools.demo_video.train --device cuda --compile

A new start continues from the last checkpoint in `--work`. Clips, captions, noise and times of a step depend only on
the seed and the step, so a resumed run gets the same data as an uninterrupted one. Without `--steps` the number of
steps follows from the device's speed and is in the log; given the same numbers, the training repeats up to the device's
order of additions.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from ..demo_model import drawings
from ..demo_model.progress import Progress
from ..demo_model.sampling import load_pipeline
from ..demo_model.scenes import Sprites
from . import autoencoder, denoiser, network
from .clips import plan_clips
from .latents import caption_ids, fill_bank
from .pacing import Pace
from .sampling import SAMPLES, as_pixels, contact_sheet, generate, save_preview


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--drawings", type=Path, default=Path(".demo-data/drawings.npz"))
    parser.add_argument("--work", type=Path, default=Path(".demo-data/video-work"), help="checkpoints, log and sheets")
    parser.add_argument("--out", type=Path, default=Path(".demo-data/video-model"), help="the finished pipeline")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoencoder-minutes", type=float, default=2.5)
    parser.add_argument("--autoencoder-steps", type=int, help="a number of steps instead of minutes")
    parser.add_argument("--autoencoder-batch", type=int, default=32, help="clips in a step")
    parser.add_argument("--autoencoder-rate", type=float, default=2e-3)
    parser.add_argument("--statistics-batches", type=int, default=32, help="for the latents' mean and deviation")
    parser.add_argument("--clips", type=int, default=196608, help="clips whose latents the denoiser learns from")
    parser.add_argument("--clips-batch", type=int, default=256, help="clips encoded together")
    parser.add_argument("--minutes", type=float, default=5.5, help="for the denoiser")
    parser.add_argument("--steps", type=int, help="a number of steps instead of minutes")
    parser.add_argument("--batch", type=int, default=768, help="noised clips in a step")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--only-autoencoder", action="store_true", help="leave after it, to go on later")
    parser.add_argument("--every", type=int, default=100, help="steps between two lines of progress")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between two checkpoints")
    parser.add_argument("--export-every", type=int, default=10000, help="steps between two sample sheets")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.monotonic()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    device = torch.device(args.device)
    progress = Progress(args.work, args.every, args.save_every)
    sprites = Sprites.from_rgba(drawings.load(args.drawings), device)
    tokenizer = network.build_tokenizer()
    vae = network.build_autoencoder().to(device)
    text_encoder = network.build_text_encoder(tokenizer).to(device)
    transformer = network.build_transformer().to(device)
    if args.compile:
        autoencoder.compile_activations()
        network.compile_blocks(transformer)

    pace = Pace(args.autoencoder_steps, args.autoencoder_minutes, device)
    settings = {"batch": args.autoencoder_batch, "rate": args.autoencoder_rate}
    autoencoder.train(vae, sprites, progress, pace, seed=args.seed, **settings)
    vae.requires_grad_(False)
    with torch.compiler.set_stance("force_eager"):  # in float32, and too short to be worth compiling
        psnr = autoencoder.set_latent_statistics(
            vae, sprites, args.seed, args.statistics_batches, args.autoencoder_batch
        )
        show_reconstructions(vae, sprites, args.seed).save(args.work / "reconstructions.png")
    progress.log(stage="autoencoder", psnr_db=round(psnr, 2), since_start=round(time.monotonic() - started, 1))

    if args.only_autoencoder:
        return

    bank = fill_bank(vae, tokenizer, sprites, seed=args.seed, count=args.clips, batch=args.clips_batch)
    progress.log(stage="latents", clips=len(bank), since_start=round(time.monotonic() - started, 1))

    def export() -> None:
        network.save_model(args.out, tokenizer, text_encoder, vae, transformer)
        clips = generate(load_pipeline(args.out, device), SAMPLES, seed=0)
        contact_sheet(clips, SAMPLES).save(args.work / "samples.png")
        save_preview(clips, args.work / "samples.webp")

    denoiser.train(
        denoiser.VideoFlowMatching(text_encoder, transformer),
        bank,
        caption_ids(tokenizer, [""])[0].to(device),
        progress,
        Pace(args.steps, args.minutes, device),
        seed=args.seed,
        batch=args.batch,
        rate=args.rate,
        export_every=args.export_every,
        export=export,
    )
    progress.log(stage="done", since_start=round(time.monotonic() - started, 1))


def show_reconstructions(vae: AutoencoderKLWan, sprites: Sprites, seed: int) -> Image.Image:
    """Sheet of clips, each above its reconstruction."""
    clips = autoencoder.on_device(plan_clips(seed + autoencoder.STATISTICS_STREAM, 0, 12), sprites)
    with torch.no_grad():
        shown = autoencoder.decode(vae, autoencoder.encode(vae, clips)[0])
    pairs = torch.stack([clips, shown], 1).flatten(0, 1)
    return contact_sheet(as_pixels(pairs), ["clip", "reconstruction"] * len(clips))


if __name__ == "__main__":
    main()
