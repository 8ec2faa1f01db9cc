"""The device of a worker: its properties, limits, memory, threads and streams."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vllm_omni.diffusion.compute.device.gpu_memory import GpuMemory
from vllm_omni.diffusion.compute.device.graph_capture import CudaGraphCapturer
from vllm_omni.diffusion.compute.device.kinds import CPU, CUDA, free_cached_memory, kind_of
from vllm_omni.diffusion.compute.device.streams import Stream, StreamEvent
from vllm_omni.diffusion.data import DeviceChoice, KernelsName
from vllm_omni.errors import ConfigError

FLOAT8_CAPABILITY = (9, 0)
"""Least compute capability of a GPU that multiplies float8 matrices with a scale for each row."""


class Device:
    """The GPU of a worker, or its share of the CPU."""

    def __init__(self, choice: DeviceChoice = "auto", index: int = 0, memory_share: float = 0.92) -> None:
        """index: number of the GPU. memory_share: of its memory, that this process may take.

        Raises ConfigError for a kind of device that this machine does not have.
        """
        self.kind = kind_of(choice)
        self.torch = torch.device(self.kind, index) if self.kind == CUDA else torch.device(self.kind)
        self._num_processes = 1
        if self.kind == CUDA:
            torch.cuda.set_device(self.torch)  # some libraries use the current device
        self._gpu_memory = GpuMemory(self.torch, memory_share) if self.kind == CUDA else None
        self._copies = self.stream(separate=True)

    @property
    def name(self) -> str:
        """Name of the GPU model, or `cpu`."""
        return torch.cuda.get_device_name(self.torch) if self.kind == CUDA else CPU

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA compute capability; None on a CPU."""
        return torch.cuda.get_device_capability(self.torch) if self.kind == CUDA else None

    def dtype(self, name: str) -> torch.dtype:
        """PyTorch dtype of this name; for `auto`, bfloat16 on a GPU and float32 on a CPU."""
        if name == "auto":
            return torch.bfloat16 if self.kind == CUDA else torch.float32
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    @property
    def is_asynchronous(self) -> bool:
        """Whether the device executes launched work while the CPU goes on."""
        return self.kind == CUDA

    @property
    def is_worth_compiling_for(self) -> bool:
        """Whether compiled code saves more time than compiling costs at every start; on a CPU it does not."""
        return self.kind == CUDA

    def choose_kernels(self, choice: KernelsName) -> KernelsName:
        """Kernels for `--kernels`; `auto`: by the device. Raises ConfigError for `triton` on a CPU."""
        if choice == "triton" and self.kind != CUDA:
            raise ConfigError(f"--kernels triton takes a GPU, got {self.name}; auto and torch run here")
        if choice == "auto":
            return "triton" if self.kind == CUDA else "torch"
        return choice

    def check_float8(self, dtype: torch.dtype) -> None:
        """Raise ConfigError for a GPU that cannot multiply float8 weights with activations of `dtype`."""
        if (why_not := why_no_float8(self.torch, dtype)) is not None:
            raise ConfigError(f"--quantization fp8 takes {why_not}")

    @property
    def multiplies_float8(self) -> bool:
        """Whether float8 saves memory here: on a CPU, and on a GPU that `check_float8` accepts."""
        return (capability := self.capability) is None or capability >= FLOAT8_CAPABILITY

    def synchronize(self) -> None:
        """Wait until the device has done all launched work."""
        if self.kind == CUDA:
            torch.cuda.synchronize(self.torch)

    def elapsed(self, run: Callable[[], object]) -> float:
        """Seconds from the call of `run` until the device has done its work."""
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start

    def stream(self, separate: bool) -> Stream:
        """The main stream, or a new separate one; a CPU has the main stream only."""
        return Stream(self.torch, separate)

    def download(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, np.ndarray]]:
        """Start copies of `tensors` to the host; the returned call waits for them and returns the arrays by name.

        The copies run on a separate stream, so neither the CPU nor later work on the device waits for them.
        """
        if self.kind == CPU or not tensors:
            return lambda: {name: x.numpy() for name, x in tensors.items()}
        with self._copies.after(tensors.values()):
            buffers = {
                name: torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
                for name, x in tensors.items()
            }
            copied = StreamEvent(self.torch)

        def arrays() -> dict[str, np.ndarray]:
            copied.wait()
            return {name: buffer.numpy().copy() for name, buffer in buffers.items()}  # frees the pinned memory

        return arrays

    def capturer(self) -> CudaGraphCapturer | None:
        """A new capturer of CUDA graphs; None on a CPU."""
        return CudaGraphCapturer(self.torch) if self.is_asynchronous else None

    @property
    def num_threads(self) -> int:
        """CPU threads that share one operation; 1 where a GPU computes."""
        return torch.get_num_threads() if self.kind == CPU else 1

    def share_machine(self, num_processes: int) -> None:
        """Use an equal part of the CPU threads and of the main memory beside the other workers of this machine."""
        self._num_processes = num_processes
        self.set_num_threads(max(1, self.num_threads // num_processes))

    def set_num_threads(self, count: int) -> None:
        """Set the CPU threads of the whole process; ignored where a GPU computes."""
        if self.kind == CPU:
            torch.set_num_threads(count)

    def end_loading(self) -> None:
        """On a GPU, limit PyTorch to one CPU thread in this process: from now on the CPU only launches kernels."""
        if self.is_asynchronous:
            torch.set_num_threads(1)

    def peak_memory_bytes(self) -> int:
        """Largest memory use so far: of PyTorch on the GPU, or of the process on a CPU."""
        if self.kind == CUDA:
            return torch.cuda.max_memory_allocated(self.torch)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def transient_memory_bytes(self) -> int:
        """Largest memory use so far, less the present use."""
        if self.kind == CUDA:
            return self.peak_memory_bytes() - torch.cuda.memory_allocated(self.torch)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return self.peak_memory_bytes() - pages * resource.getpagesize()

    def memory_budget(self) -> int:
        """Bytes that this process may take in all; on a CPU, its share of the memory that is available now."""
        return self._available_bytes() if self._gpu_memory is None else self._gpu_memory.budget_bytes

    @property
    def memory_bytes(self) -> int:
        """Bytes of the GPU's memory; on a CPU those of `memory_budget`."""
        return self._available_bytes() if self._gpu_memory is None else self._gpu_memory.total_bytes

    @property
    def others_memory_bytes(self) -> int:
        """Bytes of the GPU that others used when this process began; 0 on a CPU."""
        return 0 if self._gpu_memory is None else self._gpu_memory.others_bytes

    def free_memory_bytes(self) -> int:
        """Memory that can still be allocated within the budget; on a CPU, the share of this process."""
        return self._available_bytes() if self._gpu_memory is None else self._gpu_memory.free_bytes()

    def _available_bytes(self) -> int:
        """Available memory of the host, divided by the processes of this server."""
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        return 1024 * available // self._num_processes

    def release_memory(self) -> None:
        """Free the unused blocks of PyTorch's cache, so that a smaller attempt can follow one that ran out."""
        free_cached_memory(self.torch)

    def free_everything(self) -> None:
        """Free all device memory that no live object uses, also of cyclic garbage and of libraries' workspaces."""
        gc.collect()
        if self.kind == CUDA:
            self.synchronize()
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()

    def reserved_memory_bytes(self) -> int:
        """Memory that PyTorch holds on the GPU, used or not; 0 on a CPU."""
        return torch.cuda.memory_reserved(self.torch) if self.kind == CUDA else 0


def why_no_float8(device: torch.device, dtype: torch.dtype) -> str | None:
    """Requirement for products of float8 weights with activations of `dtype` that a GPU does not meet, if any."""
    if device.type != CUDA:
        return None
    if (capability := torch.cuda.get_device_capability(device)) < FLOAT8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return "a GPU of compute capability {}.{} or newer, got {} of {}.{}".format(
            *FLOAT8_CAPABILITY, name, *capability
        )
    if dtype != torch.bfloat16:
        return f"--dtype bfloat16 on a GPU, got {str(dtype).removeprefix('torch.')}"
    return None
