"""What a worker is made of and what is said to it and by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec import Struct

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.plan import StepPlan, StepResult, WorkerReady


class Runner(Protocol):
    """One device. `abort` may be called from another thread while `execute` runs."""

    def start(self) -> WorkerReady: ...

    def execute(self, plan: StepPlan) -> StepResult: ...

    def abort(self, request_ids: Sequence[str]) -> None: ...


@dataclass(frozen=True)
class Place:
    """Which of the workers one is."""

    rank: int = 0
    size: int = 1
    """Ranks of the replica."""
    replica: int = 0
    store_port: int = 0
    """Where the ranks of the replica meet, on 127.0.0.1."""
    store_fd: int | None = None
    """Rank 0 listens there on this socket."""

    @property
    def device_index(self) -> int:
        return self.replica * self.size + self.rank


class Start(Struct, tag=True):
    """The first message to a worker."""

    config: OmniDiffusionConfig


class Execute(Struct, tag=True):
    plan: StepPlan


class Abort(Struct, tag=True):
    request_ids: list[str]


class Stop(Struct, tag=True):
    """The worker ends at once: there is nothing to save."""


class Ready(Struct, tag=True):
    """A worker's first message, when all went well."""

    ready: WorkerReady


class Done(Struct, tag=True):
    result: StepResult


class Died(Struct, tag=True):
    """A worker's last message."""

    message: str
    traceback: str
    is_config_error: bool = False


ToWorker = Start | Execute | Abort | Stop
FromWorker = Ready | Done | Died
