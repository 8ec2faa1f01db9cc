"""Merge the answers of all ranks of a replica into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeVar

from vllm_omni.diffusion.messages.adapters import AdapterRead
from vllm_omni.diffusion.messages.plan import StepResult, WorkerReady

Value = TypeVar("Value")
Number = TypeVar("Number", int, float)


def merge_results(results: Sequence[StepResult]) -> StepResult:
    """Merge the results of all ranks, rank 0 first, into the result of one step.

    Pictures, frames, checkpoints and errors are collected from all ranks. A request has advanced only when it advanced
    on every rank; only then its cached share counts. Times are those of the slowest rank. Sequences and tokens are
    equal on all ranks.
    """
    first = results[0]
    assert all(result.step_id == first.step_id for result in results), "ranks answer every plan, in order"
    advanced = [id for id in first.advanced if all(id in result.advanced for result in results)]
    cached = _sum_by_key([result.cached for result in results])
    return StepResult(
        step_id=first.step_id,
        images=_union([result.images for result in results]),
        frames=_union([result.frames for result in results]),
        previews=_union([result.previews for result in results]),
        checkpoints=_union([result.checkpoints for result in results]),
        errors=_union([result.errors for result in results]),
        advanced=advanced,
        tiled=list(dict.fromkeys(chain(*(result.tiled for result in results)))),
        made={id: number for id, number in first.made.items() if id in advanced},
        encode_seconds=max(result.encode_seconds for result in results),
        denoise_seconds=max(result.denoise_seconds for result in results),
        decode_seconds=max(result.decode_seconds for result in results),
        checkpoint_seconds=max(result.checkpoint_seconds for result in results),
        num_sequences=max(result.num_sequences for result in results),
        num_tokens=max(result.num_tokens for result in results),
        cached={id: share for id, share in cached.items() if id in advanced},
        cache_bytes=max(result.cache_bytes for result in results),
        sent_bytes=_sum_by_key([result.sent_bytes for result in results]),
        peak_memory_bytes=max(result.peak_memory_bytes for result in results),
        adapters=[merge_reads(reads) for reads in zip(*(result.adapters for result in results), strict=True)],
    )


def merge_reads(reads: Sequence[AdapterRead]) -> AdapterRead:
    """Merge all ranks' reads of one adapter: one failure is the failure of all. Time and bytes are the largest."""
    return AdapterRead(
        reads[0].key,
        max(read.seconds for read in reads),
        max(read.num_bytes for read in reads),
        next((read.error for read in reads if read.error is not None), None),
    )


def merge_ready(readies: Sequence[WorkerReady]) -> WorkerReady:
    """Merge the measurements of all ranks, rank 0 first. The ranks agree on rates, so rank 0's are taken."""
    return replace(
        readies[0],
        load_seconds=max(ready.load_seconds for ready in readies),
        load_bytes=sum(ready.load_bytes for ready in readies),
        peak_memory_bytes=max(ready.peak_memory_bytes for ready in readies),
    )


def _sum_by_key(parts: Sequence[Mapping[str, Number]]) -> dict[str, Number]:
    return {key: sum(part.get(key, 0) for part in parts) for key in dict.fromkeys(chain(*parts))}


def _union(parts: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    """Entries of all parts; the lowest rank wins where several have the same key."""
    return {key: value for part in reversed(parts) for key, value in part.items()}
