"""Progress bar for the loading of weights, on standard error."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Self

from vllm_omni.logs.bars import progress_bar


class WeightsBar:
    """Progress bar that also counts the bytes and seconds of loading a model folder."""

    def __init__(self, path: Path, shown: bool) -> None:
        self.num_bytes = 0
        self.seconds = 0.0
        self._start = time.perf_counter()
        # An upper bound: unused weights, and shards of other ranks, are not read.
        total = sum(file.stat().st_size for file in path.glob("*/*.safetensors"))
        self._bar = progress_bar(total, "loading weights", shown=shown, unit="B", unit_scale=True)

    def update(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._bar.update(num_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self._bar.total = self.num_bytes
        self._bar.close()
