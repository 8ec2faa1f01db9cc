"""What a worker is made of and what is said to it and by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec import Struct

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult, WorkerReady

HEARTBEAT_SECONDS = 1.0


class RankInfo(Struct, frozen=True):
    """Where a worker stands among the workers of the model."""

    rank: int = 0
    """Within its replica."""
    replica_size: int = 1
    """Workers that hold one copy of the model together."""
    replica_index: int = 0
    store_port: int = 0
    """Where the ranks of a replica meet, on 127.0.0.1; a fresh one at every start, 0 for a replica of one."""
    store_fd: int | None = None
    """The socket that listens there, inherited by rank 0; None elsewhere and for a replica of one."""

    @property
    def device_index(self) -> int:
        """The device of this worker, counted over the machine."""
        return self.replica_index * self.replica_size + self.rank


class Runner(Protocol):
    """One device. `abort` may be called from another thread while `launch` runs."""

    @property
    def launches_ahead(self) -> bool:
        """Whether the device works on when `launch` has returned, so that its results are worth a thread that waits. It
        would only be in the way of a host that computes."""
        ...

    def start(self, first: WorkerReady | None = None) -> WorkerReady:
        """Load the model and warm up.

        first: the answer of this rank's first start, from which choices that change pixels are taken over; None: this
        is the first start.
        """
        ...

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Give the device a step. The call that is returned waits for its result; it may be made in another thread,
        while the next step is launched, and is made in the order of the steps."""
        ...

    def abort(self, request_ids: Sequence[str]) -> None: ...


MakeRunner = Callable[[OmniDiffusionConfig, RankInfo], Runner]
"""What a worker is told to make its runner with."""


class Start(Struct, tag=True):
    """The first message to a worker."""

    config: OmniDiffusionConfig
    rank_info: RankInfo
    first: WorkerReady | None = None
    """Measurements of the first start, which a restarted worker keeps (`Runner.start`)."""


class Execute(Struct, tag=True):
    plan: StepPlan


class Abort(Struct, tag=True):
    request_ids: list[str]


class Ready(Struct, tag=True):
    """All went well at the start."""

    ready: WorkerReady


class Heartbeat(Struct, tag=True):
    """The worker lives, said every `HEARTBEAT_SECONDS` from its start to its end, whatever it is doing."""


class Done(Struct, tag=True):
    result: StepResult


class Died(Struct, tag=True):
    """A worker's last message."""

    message: str
    traceback: str
    is_config_error: bool = False


ToWorker = Start | Execute | Abort
FromWorker = Ready | Heartbeat | Done | Died
