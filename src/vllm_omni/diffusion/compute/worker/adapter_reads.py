"""Reads of adapters, each in a thread, while steps run in another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from vllm_omni.diffusion.compute.step.pipeline import Pipeline
from vllm_omni.diffusion.compute.worker.item_errors import item_error
from vllm_omni.diffusion.messages.adapters import AdapterKey, AdapterRead, KeptFiles


class AdapterReads:
    """Reads adapters into a pipeline and reports how that went; never raises."""

    def __init__(self, pipeline: Pipeline[Any]) -> None:
        self._pipeline = pipeline

    def begin_read(
        self, key: AdapterKey, report: Callable[[AdapterRead], object], kept: KeptFiles | None = None
    ) -> None:
        """Read in a new thread, which calls `report`. The engine limits how many reads run at once."""
        # A thread for each read: a pool would keep the model alive, and a read that hangs would keep the process.
        read = partial(self._pipeline.read_adapter, kept=kept)
        threading.Thread(target=lambda: report(self._tried(read, key)), name="adapter", daemon=True).start()

    def load(self, key: AdapterKey) -> AdapterRead:
        """Load an adapter into the model, in the thread of the steps: see `Pipeline.load_adapter`."""
        return self._tried(self._pipeline.load_adapter, key)

    @staticmethod
    def _tried(run: Callable[[AdapterKey], int | None], key: AdapterKey) -> AdapterRead:
        start = time.perf_counter()
        try:
            num_bytes = run(key) or 0
        except Exception as error:  # a file may hold anything: the reason goes to the one who named it
            return AdapterRead(key, time.perf_counter() - start, error=item_error(error))
        return AdapterRead(key, time.perf_counter() - start, num_bytes)
