"""The one module that knows which kinds of device there are."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.errors import ConfigError

CPU, CUDA = "cpu", "cuda"
MAX_CPU_WORKERS = 16
"""A CPU is no fixed number of devices, but its workers share its cores."""
FLOAT8_CAPABILITY = (9, 0)
"""Of GPUs that multiply float8 with a scale a row."""


def check_world_size(parallel: DiffusionParallelConfig) -> None:
    """Raises ConfigError when this machine has fewer devices than `parallel` asks for."""
    if torch.cuda.is_available():
        most, devices = torch.cuda.device_count(), "this machine has {} GPUs"
    else:
        most, devices = MAX_CPU_WORKERS, "a CPU takes at most {} workers"
    if parallel.world_size > most:
        raise ConfigError(f"{parallel.written_out()} devices are too many: {devices.format(most)}")


class Device:
    """The device of this worker: a GPU where there is one."""

    def __init__(self, kind: str | None = None, index: int = 0) -> None:
        self.kind = kind or (CUDA if torch.cuda.is_available() else CPU)
        self.torch = torch.device(self.kind, index) if self.kind == CUDA else torch.device(self.kind)
        self._num_processes = 1
        if self.kind == CUDA:
            torch.cuda.set_device(self.torch)  # for libraries that mean the current one

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch) if self.kind == CUDA else CPU

    def dtype(self, name: str) -> torch.dtype:
        """`auto`: bfloat16 on a GPU, float32 on a CPU."""
        if name == "auto":
            return torch.bfloat16 if self.kind == CUDA else torch.float32
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def check_float8(self, dtype: torch.dtype) -> None:
        """Raises ConfigError where layers in float8 beside others in `dtype` are not computed."""
        if self.kind != CUDA:
            return
        if (capability := torch.cuda.get_device_capability(self.torch)) < FLOAT8_CAPABILITY:
            raise ConfigError(
                "--quantization fp8 takes a GPU of compute capability {}.{} or newer, got {} of {}.{}".format(
                    *FLOAT8_CAPABILITY, self.name, *capability
                )
            )
        if dtype != torch.bfloat16:
            raise ConfigError(
                f"--quantization fp8 takes --dtype bfloat16 on a GPU, got {str(dtype).removeprefix('torch.')}"
            )

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.kind == CUDA:
            torch.cuda.synchronize(self.torch)

    @property
    def num_threads(self) -> int:
        """Threads that share one operation; 1 where the processor does not compute."""
        return torch.get_num_threads() if self.kind == CPU else 1

    def share_machine(self, num_processes: int) -> None:
        """Leave the other processes of this machine their part of the processor and its memory."""
        self._num_processes = num_processes
        self.set_num_threads(max(1, self.num_threads // num_processes))

    def set_num_threads(self, count: int) -> None:
        """For this process as a whole."""
        if self.kind == CPU:
            torch.set_num_threads(count)

    def peak_memory_bytes(self) -> int:
        """Most bytes held so far: of the GPU's memory, or of the process on a CPU."""
        if self.kind == CUDA:
            return torch.cuda.max_memory_allocated(self.torch)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def free_memory_bytes(self) -> int:
        """What could still be allocated; on a CPU, this process's part of it."""
        if self.kind == CUDA:
            idle = torch.cuda.memory_reserved(self.torch) - torch.cuda.memory_allocated(self.torch)
            return torch.cuda.mem_get_info(self.torch)[0] + idle
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        return 1024 * available // self._num_processes

    def release_memory(self) -> None:
        """Give unused blocks back, so that a smaller attempt can follow one that ran out."""
        if self.kind == CUDA:
            torch.cuda.empty_cache()


class Stopwatch:
    """Seconds by stage, without waiting for the device until `seconds` is read."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = self._mark()
        try:
            yield
        finally:
            self._spans.append((stage, start, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Waits for the device."""
        self._device.synchronize()
        totals: dict[str, float] = {}
        for stage, start, end in self._spans:
            span = start.elapsed_time(end) / 1000 if self._device.kind == CUDA else end - start
            totals[stage] = totals.get(stage, 0.0) + span
        return totals

    def _mark(self) -> Any:
        if self._device.kind == CUDA:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device.torch))
            return event
        return time.perf_counter()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; PyTorch's CPU allocator has no type of its own for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
