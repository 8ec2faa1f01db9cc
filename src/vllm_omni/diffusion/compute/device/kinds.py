"""Which kinds of device there are: beside this module only the kernels of attention know."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vllm_omni.diffusion.data import DeviceChoice, DiffusionParallelConfig, KernelsName
from vllm_omni.errors import ConfigError

CPU, CUDA = "cpu", "cuda"
Output = TypeVar("Output")
MAX_CPU_WORKERS = 16
"""A CPU is no fixed number of devices, but its workers share its cores."""
FLOAT8_CAPABILITY = (9, 0)
"""Of GPUs that multiply float8 with a scale a row."""


def kind_of(choice: DeviceChoice) -> str:
    """`auto`: CUDA where this machine has it. Raises ConfigError when CUDA is asked for and there is none."""
    if choice == CUDA and not torch.cuda.is_available():
        raise ConfigError(f"--device {CUDA}: PyTorch finds no GPU on this machine; --device takes auto or {CPU} here")
    if choice == "auto":
        return CUDA if torch.cuda.is_available() else CPU
    return choice


def can_use_gpus() -> bool:
    """Whether this build of PyTorch has CUDA. Does not look at the machine, which would make a later fork useless."""
    has_cuda: bool = torch.backends.cuda.is_built()
    return has_cuda


def check_world_size(parallel: DiffusionParallelConfig, device: DeviceChoice) -> None:
    """Raises ConfigError when this machine has fewer devices than `parallel` asks for."""
    if kind_of(device) == CUDA:
        most, devices = torch.cuda.device_count(), "this machine has {} GPUs"
    else:
        most, devices = MAX_CPU_WORKERS, "a CPU takes at most {} workers"
    if parallel.world_size > most:
        raise ConfigError(f"{parallel.written_out()} devices are too many: {devices.format(most)}")


class Device:
    """The device of this worker."""

    def __init__(self, choice: DeviceChoice = "auto", index: int = 0) -> None:
        """index: of the GPU. Raises ConfigError for a device that this machine does not have."""
        self.kind = kind_of(choice)
        self.torch = torch.device(self.kind, index) if self.kind == CUDA else torch.device(self.kind)
        self._num_processes = 1
        if self.kind == CUDA:
            torch.cuda.set_device(self.torch)  # for libraries that mean the current one
        self._copies = self.stream(beside=True)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch) if self.kind == CUDA else CPU

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA compute capability; None where there is no GPU."""
        return torch.cuda.get_device_capability(self.torch) if self.kind == CUDA else None

    def dtype(self, name: str) -> torch.dtype:
        """`auto`: bfloat16 on a GPU, float32 on a CPU."""
        if name == "auto":
            return torch.bfloat16 if self.kind == CUDA else torch.float32
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    @property
    def works_ahead(self) -> bool:
        """Whether it works on what it was given while the host goes on."""
        return self.kind == CUDA

    @property
    def is_worth_compiling_for(self) -> bool:
        """Whether compiled code gains more than compiling costs at every start; on a CPU it does not."""
        return self.kind == CUDA

    def kernels(self, choice: KernelsName) -> KernelsName:
        """Those that are meant. Raises ConfigError for Triton's where Triton compiles nothing."""
        if choice == "triton" and self.kind != CUDA:
            raise ConfigError(f"--kernels triton takes a GPU, got {self.name}; auto and torch run here")
        if choice == "auto":
            return "triton" if self.kind == CUDA else "torch"
        return choice

    def check_overlap(self) -> None:
        """Raises ConfigError where no decode runs beside a step."""
        if not self.works_ahead:
            raise ConfigError(f"--overlap-decode takes a GPU, got {self.name}, which decodes between steps")

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

    def stream(self, beside: bool) -> Stream:
        """A further stream of work beside the main one; the main one itself where not `beside`, and on a CPU."""
        return Stream(self, torch.cuda.Stream(self.torch) if beside and self.kind == CUDA else None)

    def download(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, np.ndarray]]:
        """Begin to copy what the current stream makes of `tensors`; the call that is returned waits for the copies.

        They have a stream of their own: neither the device's next work nor the host waits for them.
        """
        if self.kind == CPU or not tensors:
            return lambda: {name: x.numpy() for name, x in tensors.items()}
        with self._copies.after(tensors.values()):
            buffers = {
                name: torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
                for name, x in tensors.items()
            }
            copied = Mark(self)

        def arrays() -> dict[str, np.ndarray]:
            copied.wait()
            return {name: buffer.numpy().copy() for name, buffer in buffers.items()}  # pinned memory is for transfers

        return arrays

    def capturer(self) -> CudaGraphCapturer | None:
        """None where a device does at once what it is given."""
        return CudaGraphCapturer(self) if self.works_ahead else None

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

    def end_loading(self) -> None:
        """From here on the host only feeds a device beside it, with operations too small to be shared by threads.

        For this process as a whole.
        """
        if self.works_ahead:
            torch.set_num_threads(1)

    def peak_memory_bytes(self) -> int:
        """Most bytes held so far: of the GPU's memory, or of the process on a CPU."""
        if self.kind == CUDA:
            return torch.cuda.max_memory_allocated(self.torch)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def passing_memory_bytes(self) -> int:
        """Most bytes held so far beyond those held now."""
        if self.kind == CUDA:
            return self.peak_memory_bytes() - torch.cuda.memory_allocated(self.torch)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return self.peak_memory_bytes() - pages * resource.getpagesize()

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


class Stream:
    """What a device does in order. See `Device.stream`."""

    def __init__(self, device: Device, stream: torch.cuda.Stream | None) -> None:
        self._device = device
        self._stream = stream

    @contextmanager
    def after(self, inputs: Iterable[Tensor]) -> Iterator[None]:
        """Work given to the device within runs on this stream, once what the current one was given before is done.

        inputs: what it reads; their memory is not used again before it is done.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device.torch))
        for tensor in inputs:
            if tensor.is_cuda:
                tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pause Python's cyclic garbage collection: CUDA objects that it frees during a capture may void the capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class CudaGraphCapturer:
    """CUDA graphs, one after another in one pool of memory: they must not run at the same time."""

    failure: str | None = None
    """Why something could not be recorded, for another reason than memory; from then on nothing is."""

    def __init__(self, device: Device) -> None:
        self._stream = torch.cuda.Stream(device.torch)  # the main one cannot be recorded
        self._pool: Any = None
        self._first: tuple[Tensor, Callable[[], None]] | None = None

    def release(self) -> None:
        """Give back the memory of graphs that are gone."""
        self._first = None

    def capture(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        """What `run` gives the device is not done, but recorded: its result, which each replay makes anew in place.

        Raises OutOfMemoryError also where it is CUDA that had too little for the graph itself.
        """
        with suppress(torch.OutOfMemoryError):
            return self._attempt(run)
        torch.cuda.empty_cache()  # which a recording, once begun, does not do by itself
        return self._attempt(run)

    def _attempt(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        try:
            return self._capture_in_pool(run)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise

    def _capture_in_pool(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        if self._first is None:
            # A pool whose last graph is gone cannot be used again: a fresh one, and a graph that stays until `release`.
            self._pool = torch.cuda.graph_pool_handle()
            self._first = self._capture(lambda: torch.zeros(1, device=self._stream.device))
        return self._capture(run)

    def _capture(self, run: Callable[[], Output]) -> tuple[Output, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream), no_garbage_collection():
            # Other threads may wait for the device meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = run()
                graph.capture_end()
            except BaseException:  # an interrupt, too, must not leave the stream recording
                self._abandon(graph)
                raise
        return output, graph.replay

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a recording; one that is void does not close its pool, and no memory would come back to other streams."""
        try:
            graph.capture_end()
        except RuntimeError:
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)


class Mark:
    """A point in the work that the current stream of a device was given."""

    def __init__(self, device: Device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = 0.0
        if device.kind == CUDA:
            # Blocking: who waits leaves the processor to the thread that feeds the device.
            self._event = torch.cuda.Event(enable_timing=True, blocking=True)
            self._event.record(torch.cuda.current_stream(device.torch))
        else:
            self._time = time.perf_counter()

    def wait(self) -> None:
        """Until the device has come here; what it was given since does not matter."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, start: Mark) -> float:
        """Of a mark of the same stream; both were waited for."""
        if self._event is None or start._event is None:
            return self._time - start._time
        milliseconds: float = start._event.elapsed_time(self._event)
        return milliseconds / 1000


class Stopwatch:
    """Seconds by stage, without waiting for the device until `seconds` is read."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._spans: list[tuple[str, Mark, Mark]] = []

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = Mark(self._device)
        try:
            yield
        finally:
            self._spans.append((stage, start, Mark(self._device)))

    def seconds(self) -> dict[str, float]:
        """Waits for what was measured, not for what the device was given since."""
        totals: dict[str, float] = {}
        for stage, start, end in self._spans:
            end.wait()
            totals[stage] = totals.get(stage, 0.0) + end.seconds_since(start)
        return totals


def is_device_failure(error: BaseException) -> bool:
    """Whether an error says that CUDA failed: further work in this process would raise other, misleading errors."""
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; PyTorch has no type of its own for what its CPU allocator and CUDA
    itself lack."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = "can't allocate memory", "CUDA error: out of memory"
    return isinstance(error, RuntimeError) and any(w in str(error) for w in words)
