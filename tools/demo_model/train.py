"""Train the demo model from random weights and save it as a QwenImagePipeline folder.

    python -m tools.demo_model.drawings --cache .demo-data
    python -m tools.demo_model.train --device cuda --compile --workers 12 --out demo-model

A new start continues from the last checkpoint in `--work`. Scenes, captions, noise and times of a step depend only on
the seed and the step, so a resumed run gets the same data as an uninterrupted one. The same seed on the same kind of
device and versions gives the same data and, up to the device's order of additions, the same weights.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImagePipeline
from transformers import AutoTokenizer

from . import autoencoder, denoiser, drawings, network
from .progress import Progress
from .sampling import SAMPLES, generate, grid, load_pipeline
from .scenes import Sprites, plan_batch
from .vocabulary import TRAINING_SIZES, parse_size

TOKENIZER_STREAM = 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--drawings", type=Path, default=Path(".demo-data/drawings.npz"))
    parser.add_argument("--work", type=Path, default=Path(".demo-data/work"), help="checkpoints, log and sample grid")
    parser.add_argument("--out", type=Path, default=Path(".demo-data/model"), help="the finished pipeline")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoencoder-steps", type=int, default=4000)
    parser.add_argument("--autoencoder-batch", type=int, default=128)
    parser.add_argument("--autoencoder-rate", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=24000)
    parser.add_argument("--batch", type=int, default=192, help="scenes in a step")
    parser.add_argument("--draws", type=int, default=4, help="times and noises for each scene of a step")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--init", type=Path, help="start from this saved model's weights")
    parser.add_argument("--sizes", nargs="*", help="sizes such as 64x96; one named twice is drawn twice as often")
    parser.add_argument("--singles", type=float, default=0.6, help="the part of scenes that show one thing")
    parser.add_argument("--variation", type=float, default=1.0, help="of place, scale and tilt, 0 to 1")
    parser.add_argument("--stop-at", type=int, help="leave after this step, to go on later")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare captions ahead")
    parser.add_argument("--every", type=int, default=100, help="steps between two lines of progress")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between two checkpoints")
    parser.add_argument("--export-every", type=int, default=4000, help="steps between two sample grids")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.device(args.device)
    progress = Progress(args.work, args.every, args.save_every)
    sprites = Sprites.from_rgba(drawings.load(args.drawings), device)
    network.use_single_frame_convolutions()
    network.use_real_rotary_embedding()

    tokenizer = network.build_tokenizer(
        text for step in range(20) for text in plan_batch(args.seed + TOKENIZER_STREAM, step, 500).captions
    )
    if args.init:
        tokenizer = AutoTokenizer.from_pretrained(args.init / "tokenizer")
    vae = network.build_autoencoder().to(device)
    text_encoder = network.build_text_encoder(tokenizer).to(device)
    transformer = network.build_transformer().to(device)
    if args.init:
        for part, folder in ((vae, "vae"), (text_encoder, "text_encoder"), (transformer, "transformer")):
            network.load_weights(part, args.init / folder)
    if args.compile:
        network.compile_normalisation()
        network.compile_blocks(transformer)
    common = {"seed": args.seed, "workers": args.workers}

    settings = {
        "steps": args.autoencoder_steps,
        "batch": args.autoencoder_batch,
        "rate": args.autoencoder_rate,
    }
    autoencoder.train(vae, sprites, progress, **settings, **common)
    with torch.compiler.set_stance("force_eager"):  # in float32, and too short to be worth compiling
        psnr = autoencoder.set_latent_statistics(vae, sprites, args.seed, batches=32)
    progress.log(stage="autoencoder", psnr_db=round(psnr, 2))
    vae.eval().requires_grad_(False)

    def export() -> None:
        save(args.out, tokenizer, text_encoder, vae, transformer)
        pictures = generate(load_pipeline(args.out, device), SAMPLES, (64, 64), seed=0)
        grid(pictures, SAMPLES, columns=8).save(args.work / "samples.png")

    model = denoiser.FlowMatching(vae, denoiser.CaptionEncoder(text_encoder, tokenizer), transformer, args.draws)
    settings = {
        "steps": args.steps,
        "stop_at": args.stop_at or args.steps,
        "batch": args.batch,
        "rate": args.rate,
    }
    sizes = [parse_size(size) for size in args.sizes] if args.sizes else TRAINING_SIZES
    denoiser.train(
        model,
        denoiser.caption_tokens(tokenizer),
        sprites,
        progress,
        **settings,
        **common,
        world={"sizes": sizes, "singles": args.singles, "variation": args.variation},
        export_every=args.export_every,
        export=export,
    )


def save(folder: Path, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any) -> None:
    """Save copies without the compiler's wrappers and with the transformer's original rotary tables."""
    plain_text_encoder = network.build_text_encoder(tokenizer)
    plain_text_encoder.load_state_dict(text_encoder.state_dict())
    plain_vae, plain_transformer = network.build_autoencoder(), network.build_transformer()
    plain_vae.load_state_dict(vae.state_dict())
    plain_vae.register_to_config(latents_mean=vae.config.latents_mean, latents_std=vae.config.latents_std)
    plain_transformer.load_state_dict(transformer.state_dict())
    network.save_pipeline(
        folder,
        QwenImagePipeline,
        tokenizer=tokenizer,
        text_encoder=plain_text_encoder,
        vae=plain_vae,
        transformer=plain_transformer,
        scheduler=network.build_scheduler(),
    )


if __name__ == "__main__":
    main()
