"""Train one adapter of the demo model: night, lighthouse or fast.

    python -m tools.demo_model.drawings --cache .demo-data
    python -m tools.demo_adapters.train night --out .demo-data/adapters --device cuda --workers 4

A new start continues from the last checkpoint in `--work`. Scenes, captions, noise and times of a step depend only on
the seed and the step.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..demo_model import network
from ..demo_model.denoiser import CaptionEncoder, FlowMatching
from ..demo_model.progress import Progress
from ..demo_model.sampling import load_pipeline
from ..demo_model.vocabulary import NATIVE
from . import distil, flow, night
from .low_rank import Adapter
from .things import LABELS, load_sprites
from .training import Course, Training

# the native size, three times as often as each other one
SIZES = (NATIVE, NATIVE, NATIVE, (64, 96), (96, 64), (96, 96), (128, 128))
WORLDS = {
    "night": flow.World(night.draw, {"sizes": SIZES, "singles": 0.7}),
    "lighthouse": flow.World(flow.draw_plain, {"sizes": SIZES, "singles": 0.6, "things": LABELS, "with_last": 0.6}),
}


@dataclass(frozen=True)
class Length:
    """Length of a training. `batch` scenes a step, each at `draws` times with as many noises."""

    steps: int
    batch: int
    draws: int
    rate: float


LENGTHS = {
    "night": Length(steps=4000, batch=128, draws=4, rate=4e-3),
    "lighthouse": Length(steps=3000, batch=128, draws=4, rate=4e-3),
    "fast": Length(steps=2000, batch=512, draws=1, rate=3e-3),
}
LESSONS = 16_384  # prompts that the teacher draws at the native size; a quarter at each other one


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", choices=LENGTHS)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets one folder for each adapter")
    parser.add_argument("--model", type=Path, default=Path("src/vllm_omni/demo_model"))
    parser.add_argument("--drawings", type=Path, default=Path(".demo-data/drawings.npz"))
    parser.add_argument("--work", type=Path, default=Path(".demo-data/adapters-work"), help="checkpoints and log")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the usual number")
    parser.add_argument("--batch", type=int, help="scenes of a step, instead of the usual number")
    parser.add_argument(
        "--lessons", type=int, default=LESSONS, help="of fast: prompts that the teacher draws at the native size"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare captions ahead")
    parser.add_argument("--every", type=int, default=100, help="steps between two lines of progress")
    parser.add_argument("--save-every", type=int, default=500, help="steps between two checkpoints")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.device(args.device)
    progress = Progress(args.work, args.every, args.save_every)
    network.use_single_frame_convolutions()
    network.use_real_rotary_embedding()
    pipeline = load_pipeline(args.model, device)
    for part in (pipeline.text_encoder, pipeline.vae, pipeline.transformer):
        part.requires_grad_(False)
    length = LENGTHS[args.name]
    taught = {}
    if args.name == "fast":  # while the model has no adapter yet: it is the teacher
        counts = {size: args.lessons if size == NATIVE else args.lessons // 4 for size in dict.fromkeys(SIZES)}
        taught = distil.lessons(pipeline, args.seed, counts, device)
    adapter = Adapter(pipeline.transformer, args.seed)
    encoder = CaptionEncoder(pipeline.text_encoder, pipeline.tokenizer)
    model = FlowMatching(pipeline.vae, encoder, pipeline.transformer, length.draws)
    course = Course(
        stage=args.name,
        seed=args.seed,
        steps=args.steps or length.steps,
        batch=args.batch or length.batch,
        rate=length.rate,
        export=partial(adapter.save, args.out / args.name),
    )
    training = Training(adapter, course, progress)
    if args.name == "fast":
        distil.train(training, model, taught)
    else:
        sprites = load_sprites(args.drawings, device)
        world = WORLDS[args.name]
        flow.train(training, model, pipeline.tokenizer, sprites, world, workers=args.workers)


if __name__ == "__main__":
    main()
