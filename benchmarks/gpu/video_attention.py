"""Section `video_attention`: attention backends at the lengths of videos."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.report import Case, Row
from benchmarks.gpu.video_step import FRAMES, LARGE, SIZES, SMALL
from benchmarks.timing import measure
from vllm_omni.diffusion.compute.attention import BACKENDS, Setting, backend_class, create_attention
from vllm_omni.diffusion.compute.packing import Offsets
from vllm_omni.diffusion.data import AttentionBackendName
from vllm_omni.errors import ConfigError

BUDGET_SECONDS = 0.3
TEXT_TOKENS = 512


def section_video_attention(bench: Bench) -> Iterator[Case]:
    """Measure T/s of each backend in one layer: a video's tokens to themselves, with keys and values as the blocks give
    them, and to a text. Prediction: the data sheet's rate."""
    for resolution in SIZES:
        for model in (LARGE, SMALL):
            for backend in BACKENDS:
                case = f"{model} {resolution}, {backend}"
                yield Case(case, partial(_measure, bench, case, model, resolution, backend))


@torch.inference_mode()
def _measure(bench: Bench, case: str, model: str, resolution: str, backend: AttentionBackendName) -> list[Row]:
    shape = bench.shape(model)
    tokens = bench.info(model).num_image_tokens(*bench.video(*SIZES[resolution], FRAMES))
    text = min(TEXT_TOKENS, tokens)
    on_gpu = bench.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    capability = torch.cuda.get_device_capability(bench.device) if on_gpu else None
    if reason := backend_class(backend).why_not(Setting(bench.device, capability, dtype, shape.head_dim)):
        raise ConfigError(reason)
    attend = create_attention(backend).attend

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=dtype, device=bench.device)

    # Queries and keys leave their norm in rows of their own; values are a part of the projection's rows.
    q, k = random(2, tokens, shape.heads, shape.head_dim).unbind()
    v = random(tokens, 3, shape.heads, shape.head_dim)[:, 2]
    text_k, text_v = random(2, text, shape.heads, shape.head_dim).unbind()
    all_tokens, all_text = (Offsets.of([n], bench.device) for n in (tokens, text))
    targets: dict[str, tuple[Tensor, Tensor, Offsets]] = {
        "itself": (k, v, all_tokens),
        "the text": (text_k, text_v, all_text),
    }
    rows = []
    for name, (keys, values, offsets) in targets.items():
        seconds = measure(
            partial(attend, q, keys, values, all_tokens, offsets),
            bench.device,
            warm_ups=1,
            budget=0.01 if bench.tiny else BUDGET_SECONDS,
        )
        rate = 4 * tokens * len(keys) * shape.dim / seconds.median / 1e12
        detail: dict[str, Any] = {"ms": 1e3 * seconds.median, "tokens": tokens, "heads": shape.heads}
        rows.append(Row(f"{case}, {name}", rate, "T/s", detail=detail))
    return rows
