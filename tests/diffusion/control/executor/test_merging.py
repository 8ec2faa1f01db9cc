"""The answers of several ranks as one."""

from __future__ import annotations

import numpy as np
import pytest

from testbed.fakes import make_ready
from vllm_omni.diffusion.control.executor.merging import merge_ready, merge_results
from vllm_omni.diffusion.messages.plan import ItemError, StepResult

PICTURES = [np.full((2, 2, 3), value, np.uint8) for value in range(4)]


def test_one_step_of_three_ranks() -> None:
    merged = merge_results(
        [
            StepResult(
                5,
                images={"a": PICTURES[0]},
                errors={"x": ItemError("first", "internal")},
                advanced=["d", "e", "f"],
                made={"e": 2, "f": 0},
                tiled=["a"],
                encode_seconds=1.0,
                denoise_seconds=2.0,
                decode_seconds=3.0,
                num_sequences=4,
                num_tokens=100,
                cached={"d": 0.5, "e": 0.5},
                cache_bytes=30,
                peak_memory_bytes=7,
            ),
            StepResult(
                5,
                images={"b": PICTURES[1]},
                tiled=["b", "a"],
                advanced=["f", "d"],
                encode_seconds=2.0,
                peak_memory_bytes=9,
                cache_bytes=40,
                cached={"d": 0.5, "f": 0.5},
            ),
            StepResult(
                5,
                previews={"d": PICTURES[2]},
                errors={"x": ItemError("second", "internal"), "e": ItemError("third", "out_of_memory")},
                advanced=["f", "d"],
                denoise_seconds=2.5,
                num_sequences=4,
                num_tokens=100,
            ),
        ]
    )
    assert merged == StepResult(
        5,
        images={"a": PICTURES[0], "b": PICTURES[1]},
        previews={"d": PICTURES[2]},
        errors={"x": ItemError("first", "internal"), "e": ItemError("third", "out_of_memory")},
        advanced=["d", "f"],
        made={"f": 0},
        tiled=["a", "b"],
        encode_seconds=2.0,
        denoise_seconds=2.5,
        decode_seconds=3.0,
        cached={"d": 1.0, "f": 0.5},
        cache_bytes=40,
        num_sequences=4,
        num_tokens=100,
        peak_memory_bytes=9,
    )


def test_a_single_rank_is_itself() -> None:
    result = StepResult(1, images={"a": PICTURES[3]}, advanced=["b"], num_tokens=3)
    assert merge_results([result]) == result


def test_ranks_out_of_step_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        merge_results([StepResult(1), StepResult(2)])


def test_workers_are_ready_as_one() -> None:
    readies = [
        make_ready(load_seconds=2.0, load_bytes=10, max_batch_tokens=512, peak_memory_bytes=3),
        make_ready(load_seconds=5.0, load_bytes=20, max_batch_tokens=256, peak_memory_bytes=4),
    ]
    assert merge_ready(readies) == make_ready(
        load_seconds=5.0, load_bytes=30, max_batch_tokens=512, peak_memory_bytes=4
    )
