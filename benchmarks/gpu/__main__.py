"""All measurements of a GPU, with random weights of the published sizes: no download.

    python -m benchmarks.gpu --out out/gpu.json                             # everything, under 8 minutes a call
    python -m benchmarks.gpu --sections ceilings,step --out out/gpu.json    # continues where the file ends
    python -m benchmarks.gpu --sections step --only default "diffusers, eager"   # cases whose names have one of these
    python -m benchmarks.gpu --tiny                                         # the same code, small, on any machine

Each case prints the roofline's prediction, then the measurement: the median of repeats after a warm-up. Rows are
written at once. A call that runs out of its minutes says so; the next one skips the rows that exist. An option that
this version or machine lacks gives a row with the reason. Needs torch, diffusers and transformers, but not vllm.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import diffusers
import torch

from benchmarks.gpu import (
    batching,
    caches,
    communication,
    engine,
    fused,
    idle,
    kernels,
    layouts,
    load,
    memory,
    offload,
    step,
    video_attention,
    video_beside,
    video_cache,
    video_decode,
    video_kernels,
    video_layouts,
    video_step,
)
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.report import Case, Report, Row
from benchmarks.timing import here, release_memory
from vllm_omni.errors import ConfigError

SECTIONS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "ceilings": kernels.section_ceilings,
    "parity": kernels.section_parity,
    "kernels": fused.section_kernels,
    "step": step.section_step,
    "profile": fused.section_profile,
    "end_to_end": engine.section_end_to_end,
    "batching": batching.section_batching,
    "caches": caches.section_caches,
    "idle": idle.section_idle,
    "communication": communication.section_communication,
    "layouts": layouts.section_layouts,
    "load": load.section_load,
    "offload": offload.section_offload,
    "memory": memory.section_memory,
    "video_attention": video_attention.section_video_attention,
    "video_kernels": video_kernels.section_video_kernels,
    "video_step": video_step.section_video_step,
    "video_beside": video_beside.section_video_beside,
    "video_decode": video_decode.section_video_decode,
    "video_further": video_step.section_video_further,
    "video_cache": video_cache.section_video_cache,
    "video_layouts": video_layouts.section_video_layouts,
}
"""Name -> section, in the order in which they run: predictions use the measured ceilings."""
LAYOUTS = ("ulysses=2", "ring=2", "cfg=2", "tensor=2")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--only", nargs="+", default=[""], help='cases: parts of their names, such as "step/z-image"')
    parser.add_argument("--out", type=Path, default=Path("out/gpu.json"), help="rows; an existing file is gone on with")
    parser.add_argument("--models", type=Path, default=Path("out/models"), help="where model folders are written")
    parser.add_argument("--minutes", type=float, default=6.5, help="no case begins later")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps of whole pictures")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--layouts", nargs="*", default=LAYOUTS, help="such as ulysses=2,cfg=2; default: those of two")
    parser.add_argument("--enforce-eager", action="store_true", help="engines without compiled code and CUDA graphs")
    return parser.parse_args(argv)


def run_sections(bench: Bench, sections: Sequence[str], only: Sequence[str], seconds: float) -> bool:
    """Run every case without rows whose name, section included, has one of `only`; False if time ran out before the
    last one."""
    deadline = time.monotonic() + seconds
    for section in sections:
        bench.start_afresh()
        for case in SECTIONS[section](bench):
            name = f"{section}/{case.name}"
            if bench.report.has(section, case.name) or not any(part in name for part in only):
                continue
            if time.monotonic() > deadline:
                print(f"out of time before {name}: call again to go on")
                return False
            predicted = "nothing" if case.predicted is None else f"{case.predicted:.4g} ms"
            print(f"{name}: predicted {predicted}", flush=True)
            rows = run_case(case)
            release_memory(bench.device)  # not inside the case, whose variables still hold the memory
            bench.report.add(section, case.name, rows)
            for row in rows:
                print(row.line(), flush=True)
    return True


def run_case(case: Case) -> list[Row]:
    """Run a case. Any failure becomes a row with its reason, because the other cases are worth their time."""
    try:
        return case.run()
    except ConfigError as error:
        return [Row(case.name, predicted=case.predicted, refused=str(error))]
    except Exception as error:
        traceback.print_exc()
        reason = (str(error).splitlines() or [""])[0]
        return [Row(case.name, predicted=case.predicted, refused=f"failed: {type(error).__name__}: {reason}")]


def environment(tiny: bool, enforce_eager: bool = False) -> dict[str, str | int | bool]:
    device = here()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "devices": torch.cuda.device_count(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "tiny": tiny,
        "enforce_eager": enforce_eager,
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    sections = args.sections.split(",")
    if unknown := set(sections) - set(SECTIONS):
        sys.exit(f"--sections takes {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    try:
        report = Report(args.out, environment(args.tiny, args.enforce_eager))
        chosen = tuple(layouts.parse_layout(text) for text in args.layouts)
    except ValueError as error:
        sys.exit(str(error))
    if args.tiny:  # on a busy machine, threads wait for each other longer than they work
        torch.set_num_threads(1)
    bench = Bench(report, args.models, here(), args.tiny, args.quick, chosen, args.enforce_eager)
    is_done = run_sections(bench, sections, args.only, 60 * args.minutes)
    print(f"\n{report.table()}")
    sys.exit(0 if is_done else 3)


if __name__ == "__main__":
    main()
