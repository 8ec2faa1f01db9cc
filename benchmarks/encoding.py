"""CPU time and size of the server's picture encoders against Pillow's PNG, for each kind of picture.

python -m benchmarks.encoding
python -m benchmarks.encoding --size 1536x1024 --kinds text,drawing
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Sequence

from PIL import Image

from benchmarks.pictures import PICTURES, picture
from vllm_omni.entrypoints.openai.responses.encoding import ImageFormat, base64_between, encode

FORMATS = (ImageFormat("png", 100), ImageFormat("jpeg", 100), ImageFormat("jpeg", 80), ImageFormat("webp", 100))


def cpu_milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Least CPU time of `run` in this thread; a busy machine changes it less than wall-clock time."""
    run()
    best = float("inf")
    for _ in range(repeats):
        start = time.thread_time()
        run()
        best = min(best, time.thread_time() - start)
    return 1e3 * best


def rows_of(kind: str, size: tuple[int, int], repeats: int) -> list[tuple[str, float, int]]:
    """Name, milliseconds and bytes of each encoder; the first is the reference for the others."""
    pixels = picture(kind, *size)

    def pillow() -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        return file.getvalue()

    rows = [("Pillow, level 1", cpu_milliseconds(pillow, repeats), len(pillow()))]
    for each in FORMATS:
        name = each.name if each.name == "png" else f"{each.name} {each.quality}"
        data = encode(pixels, each)
        rows.append((name, cpu_milliseconds(lambda each=each: encode(pixels, each), repeats), len(data)))  # type: ignore[misc]
    png = encode(pixels, FORMATS[0])
    in_json = base64_between(b"", png, b"")
    return [*rows, ("png to base64", cpu_milliseconds(lambda: base64_between(b"", png, b""), repeats), len(in_json))]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1024x1024", help="width x height")
    parser.add_argument("--kinds", type=lambda s: s.split(","), default=list(PICTURES))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    width, height = (int(side) for side in args.size.split("x"))
    print(f"{'picture':<12}{'encoder':<18}{'CPU ms':>8}{'MB':>8}{'of Pillow':>11}")
    for kind in args.kinds:
        rows = rows_of(kind, (height, width), args.repeats)
        for name, milliseconds, num_bytes in rows:
            print(f"{kind:<12}{name:<18}{milliseconds:>8.1f}{num_bytes / 1e6:>8.3f}{num_bytes / rows[0][2]:>11.2f}")


if __name__ == "__main__":
    main()
