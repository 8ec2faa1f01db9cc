"""Cost of a video's encoding beside the decode of its frames, for each file format.

python -m benchmarks.video_encoding
python -m benchmarks.video_encoding --model Wan-AI/Wan2.2-TI2V-5B-Diffusers --frames 121 --steps 2

decode: of all frames, in one piece or in several. encode: time of the encoder's threads, most of it during the decode.
wait: from the last frames to the finished files, which is what the encoding adds to a video's time.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_omni import AsyncOmni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.video_jobs.encoding import OUTPUT_FORMATS, VideoEncoderPool

DEFAULT_FPS = 16


@dataclass(frozen=True)
class Times:
    """Seconds of one video's decode and encoding, and the bytes of its file."""

    decode: float
    encode: float
    wait: float
    num_bytes: int


async def measure(
    omni: AsyncOmni, pool: VideoEncoderPool, output_format: str, params: OmniDiffusionSamplingParams, folder: Path
) -> Times:
    """Make one video and encode its frames as they come."""
    encoding, decode, last = None, 0.0, 0.0
    async for output in omni.generate("a red fox in the snow", params):
        decode = output.timings.get("vae_decode", decode)
        if output.frames is None:
            continue
        last = time.perf_counter()
        if encoding is None:
            _, height, width, _ = output.frames.shape
            num_frames = params.num_frames or 0
            encoding = pool.begin(output_format, num_frames, height, width, output.fps or DEFAULT_FPS, folder)
        encoding.add(output.frames)
    assert encoding is not None, "the model makes videos"
    encoded = await encoding.finish()
    wait = time.perf_counter() - last
    num_bytes = encoded.video.stat().st_size
    encoded.remove()
    return Times(decode, encoded.seconds, wait, num_bytes)


async def run(model: str, params: OmniDiffusionSamplingParams, threads: int) -> dict[str, Times]:
    """Times of each format, after one video that warms up."""
    pool = VideoEncoderPool(threads)
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncOmni(model=model) as omni:
            await measure(omni, pool, "mp4", params, Path(folder))
            times = {name: await measure(omni, pool, name, params, Path(folder)) for name in OUTPUT_FORMATS}
        await pool.close()
    return times


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-video")
    parser.add_argument("--size", help="width x height; default: the model's own")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="threads of the pool")
    args = parser.parse_args(argv)
    width, height = (int(side) for side in args.size.split("x")) if args.size else (None, None)
    params = OmniDiffusionSamplingParams(
        width=width,
        height=height,
        num_frames=args.frames,
        num_inference_steps=args.steps,
        seed=7,
        output_type="np",
    )
    times = asyncio.run(run(args.model, params, args.threads))
    print(f"{'format':<8}{'decode s':>10}{'encode s':>10}{'encode/decode':>15}{'wait s':>8}{'MB':>9}")
    for name, each in times.items():
        ratio = each.encode / each.decode
        print(
            f"{name:<8}{each.decode:>10.3f}{each.encode:>10.3f}{ratio:>15.2f}{each.wait:>8.3f}"
            f"{each.num_bytes / 1e6:>9.3f}"
        )


if __name__ == "__main__":
    main()
