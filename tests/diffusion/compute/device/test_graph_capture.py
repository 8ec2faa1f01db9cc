"""Capture of CUDA graphs: a lack of memory, other failures, and Python's garbage collection."""

from __future__ import annotations

import gc
from contextlib import suppress

import pytest
import torch

from vllm_omni.diffusion.compute.device.graph_capture import CudaGraphCapturer, no_garbage_collection


@pytest.mark.parametrize(
    "lacking", [torch.OutOfMemoryError("no room"), RuntimeError("CUDA error: out of memory\nSearch")]
)
@pytest.mark.parametrize("failures", [1, 2])
def test_a_capture_without_memory_is_tried_once_more(
    monkeypatch: pytest.MonkeyPatch, lacking: Exception, failures: int
) -> None:
    capturer = CudaGraphCapturer.__new__(CudaGraphCapturer)  # without its stream, which the CPU does not have
    attempts: list[int] = []

    def capture(run: object) -> tuple[str, object]:
        attempts.append(1)
        if len(attempts) <= failures:
            raise lacking
        return "output", run

    monkeypatch.setattr(capturer, "_capture_in_pool", capture)
    if failures == 1:
        assert capturer.capture(lambda: None)[0] == "output"
    else:
        with pytest.raises(torch.OutOfMemoryError):
            capturer.capture(lambda: None)
    assert len(attempts) == 2


def test_a_capture_that_fails_otherwise_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    capturer = CudaGraphCapturer.__new__(CudaGraphCapturer)
    errors = iter([RuntimeError("not permitted when stream is capturing")])
    monkeypatch.setattr(capturer, "_capture_in_pool", lambda run: (_ for _ in ()).throw(next(errors)))
    with pytest.raises(RuntimeError, match="not permitted"):
        capturer.capture(lambda: None)


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_paused_and_then_restored(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with no_garbage_collection():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
        with suppress(KeyError), no_garbage_collection():
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
