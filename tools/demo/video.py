"""Make a video with the embedded video model, without a server, and write it as an MP4 file.

`make demo` runs this after `tools/demo/run.py`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.omni import Omni
from vllm_omni.outputs import write_video

PROMPT = "a rocket moving up on a black background"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="demo-video")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--out", type=Path, default=Path("out/demo.mp4"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with Omni(model=args.model) as omni:
        began = time.monotonic()
        (output,) = omni.generate(args.prompt, OmniDiffusionSamplingParams(output_type="np", seed=7))
        seconds = time.monotonic() - began
    (frames,) = output.images
    if output.fps is None:
        raise SystemExit(f"{args.model} makes no videos: the demo takes a model with frames per second")
    write_video(frames, args.out, output.fps)
    print(f"\n{args.prompt!r}: {args.out}, {len(frames)} frames, {seconds:.2f} s\n", flush=True)


if __name__ == "__main__":
    main()
