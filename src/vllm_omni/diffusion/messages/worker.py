"""Messages between an executor and its workers, and the interface of the runner inside a worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec import Struct

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.adapters import AdapterKey, AdapterRead, KeptFiles
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult, WorkerReady
from vllm_omni.diffusion.messages.weights_moved import WeightsMoved

HEARTBEAT_SECONDS = 1.0
"""Pause between two heartbeats of a worker."""


class RankInfo(Struct, frozen=True):
    """Rank of a worker, its replica, and the store where the ranks of the replica meet."""

    rank: int = 0
    """Number of the worker within its replica, from 0."""
    replica_size: int = 1
    """Workers that hold one copy of the model together."""
    replica_index: int = 0
    store_port: int = 0
    """Port on 127.0.0.1 of the store where the ranks of a replica meet, new at every start; 0 for a replica of one."""
    store_fd: int | None = None
    """Descriptor of the listening socket on `store_port`, which rank 0 inherits; None for all other workers."""

    @property
    def device_index(self) -> int:
        """Index of this worker's device on the machine."""
        return self.replica_index * self.replica_size + self.rank


class Runner(Protocol):
    """Runs plans on one device. `abort` may be called from another thread while `launch` runs."""

    @property
    def launches_ahead(self) -> bool:
        """Whether the device still computes when `launch` returns; then another thread waits for results."""
        ...

    def start(self, first: WorkerReady | None = None) -> WorkerReady:
        """Load the model and warm up. A restart repeats the choices of its `first` start that change pixels."""
        ...

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Launch a step; return a function, for any thread, that waits for its result. Calls keep the order."""
        ...

    def abort(self, request_ids: Sequence[str]) -> None: ...

    def sleep(self) -> WeightsMoved:
        """Drop all requests and adapters, and move the weights to host memory. No step is under way."""
        ...

    def wake_up(self) -> WeightsMoved:
        """Move the weights back. Where one rank lacks memory, none moves them, and the report has the reason."""
        ...

    def close(self) -> None:
        """Free the device's memory, for a runner whose process goes on without it. No step is under way."""
        ...

    def read_adapter(
        self, key: AdapterKey, report: Callable[[AdapterRead], object], kept: KeptFiles | None = None
    ) -> None:
        """Begin to read an adapter into host memory and return; a thread reads it and calls `report`, from there.

        kept: the open files to read; None: those at the path of `key`.
        """
        ...

    def forget_adapters(self, keys: Sequence[AdapterKey]) -> None:
        """Drop adapters from host memory. Callable from another thread."""
        ...


MakeRunner = Callable[[OmniDiffusionConfig, RankInfo], Runner]
"""Factory of a worker's runner; named as "module:function" when the worker is started."""


class Start(Struct, tag=True):
    """First message to a worker: load the model and warm up."""

    config: OmniDiffusionConfig
    rank_info: RankInfo
    first: WorkerReady | None = None
    """Measurements of this rank's first start, for a restart (see `Runner.start`)."""


class Execute(Struct, tag=True):
    """Run a plan."""

    plan: StepPlan


class Sleep(Struct, tag=True):
    """Drop all requests and move the weights to host memory."""


class WakeUp(Struct, tag=True):
    """Move the weights back to the device."""


class Abort(Struct, tag=True):
    """Skip these requests, also in plans that were sent and have not begun."""

    request_ids: list[str]


class ReadAdapter(Struct, tag=True):
    """Read an adapter into host memory, while steps run."""

    key: AdapterKey
    kept: KeptFiles | None = None


class ForgetAdapters(Struct, tag=True):
    """Drop adapters from host memory."""

    keys: list[AdapterKey]


class Ready(Struct, tag=True):
    """Answer to `Start`: the worker is ready for plans."""

    ready: WorkerReady


class Heartbeat(Struct, tag=True):
    """Sign of life, sent every `HEARTBEAT_SECONDS` by a thread of its own, also while a step runs."""


class Done(Struct, tag=True):
    """Answer to `Execute`: the result of the step."""

    result: StepResult


class HasMoved(Struct, tag=True):
    """Answer to `Sleep` and `WakeUp`."""

    report: WeightsMoved


class HasReadAdapter(Struct, tag=True):
    """Answer to `ReadAdapter`."""

    report: AdapterRead


class Died(Struct, tag=True):
    """Last message of a worker that fails: the reason."""

    message: str
    traceback: str
    is_config_error: bool = False


ToWorker = Start | Execute | Sleep | WakeUp | Abort | ReadAdapter | ForgetAdapters
FromWorker = Ready | Heartbeat | Done | HasMoved | HasReadAdapter | Died
