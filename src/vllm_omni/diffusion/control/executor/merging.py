"""One answer out of the answers of all ranks of a replica."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeVar

from vllm_omni.diffusion.messages.plan import StepResult, WorkerReady

Value = TypeVar("Value")
Number = TypeVar("Number", int, float)


def merge_results(results: Sequence[StepResult]) -> StepResult:
    """The outcome of one step. `results`: of all ranks, from rank 0 on.

    A picture is made by some rank, an error is met by some rank, but a request has advanced only where all ranks
    advanced it, and only then counts as cached. The step took as long as its slowest rank; its sequences and tokens are
    the same for all.
    """
    first = results[0]
    assert all(result.step_id == first.step_id for result in results), "ranks answer every plan, in order"
    advanced = [i for i in first.advanced if all(i in result.advanced for result in results)]
    cached = _added([result.cached for result in results])
    return StepResult(
        step_id=first.step_id,
        images=_united([result.images for result in results]),
        previews=_united([result.previews for result in results]),
        errors=_united([result.errors for result in results]),
        advanced=advanced,
        made={i: number for i, number in first.made.items() if i in advanced},
        encode_seconds=max(result.encode_seconds for result in results),
        denoise_seconds=max(result.denoise_seconds for result in results),
        decode_seconds=max(result.decode_seconds for result in results),
        num_sequences=max(result.num_sequences for result in results),
        num_tokens=max(result.num_tokens for result in results),
        cached={i: share for i, share in cached.items() if i in advanced},
        cache_bytes=max(result.cache_bytes for result in results),
        sent_bytes=_added([result.sent_bytes for result in results]),
        peak_memory_bytes=max(result.peak_memory_bytes for result in results),
    )


def merge_ready(readies: Sequence[WorkerReady]) -> WorkerReady:
    """What the workers are as one, given from rank 0 on. Of the rates, on which ranks agree, the first one's."""
    return replace(
        readies[0],
        load_seconds=max(ready.load_seconds for ready in readies),
        load_bytes=sum(ready.load_bytes for ready in readies),
        peak_memory_bytes=max(ready.peak_memory_bytes for ready in readies),
    )


def _added(parts: Sequence[Mapping[str, Number]]) -> dict[str, Number]:
    return {key: sum(part.get(key, 0) for part in parts) for key in dict.fromkeys(chain(*parts))}


def _united(parts: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    """All entries; where several ranks have one, the lowest rank's."""
    return {key: value for part in reversed(parts) for key, value in part.items()}
