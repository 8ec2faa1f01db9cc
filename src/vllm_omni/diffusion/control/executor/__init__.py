"""Executors: `uni` runs the worker in a thread of this process, `mp` in a process per rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.control.executor.launch import EarlyWorkers
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.adapters import AdapterKey, AdapterRead, KeptFiles
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult, WorkerReady
from vllm_omni.diffusion.messages.weights_moved import WeightsMoved


class Executor(Protocol):
    """Workers of one replica, in a thread of this process or in processes of their own."""

    async def start(self) -> WorkerReady:
        """Start workers; after a death, new ones (see `Runner.start`). Raises ConfigError or WorkerDiedError."""

    def submit(self, plan: StepPlan) -> None:
        """Send a plan without waiting; at most two plans are in flight."""

    def abort(self, request_ids: Sequence[str]) -> None:
        """Skip these requests, also in plans that were sent and have not begun."""

    on_adapter_read: Callable[[AdapterRead], object]
    """Called on the event loop when all ranks have read an adapter, or failed to. The engine sets it before `start`."""

    def read_adapter(self, key: AdapterKey, kept: KeptFiles | None = None) -> None:
        """Let all ranks read an adapter into host memory while steps run.

        kept: files of this process that they read; None: those at the path of `key`.
        """

    def forget_adapters(self, keys: Sequence[AdapterKey]) -> None:
        """Let all ranks drop adapters from host memory."""

    async def next_result(self) -> StepResult:
        """Result of the oldest plan in flight. Raises WorkerDiedError, also while no plan is in flight."""

    async def sleep(self) -> WeightsMoved:
        """Let all ranks drop requests and adapters, and move the weights to host memory. No plan is in flight.

        Raises WorkerDiedError.
        """

    async def wake_up(self) -> WeightsMoved:
        """Let all ranks move the weights back, or none: then the report has the reason. Raises WorkerDiedError."""

    async def stop(self) -> None:
        """End the workers and free their memory; `start` starts new ones. No plan is in flight."""

    async def close(self) -> None:
        """End the workers. May be called twice."""

    def kill(self) -> None:
        """End the workers at once, without awaiting anything: for callers whose event loop may have ended."""


def make_executor(
    config: OmniDiffusionConfig, info: ModelInfo, replica_index: int = 0, early: EarlyWorkers | None = None
) -> Executor:
    """Make the executor that `config.distributed_executor_backend` names; its module is imported only then.

    early: workers that were launched before the config was checked, of which this replica's are taken over.
    Raises ConfigError when this machine lacks the devices that `config` asks for.
    """
    if config.parallel.world_size > 1 or config.device != "auto":
        # One device of any kind is always there: no check, because the check imports PyTorch.
        from vllm_omni.diffusion.compute.device.kinds import check_world_size

        check_world_size(config.parallel, config.device)
    if config.distributed_executor_backend == "uni":
        from vllm_omni.diffusion.compute.worker.runner import ModelRunner
        from vllm_omni.diffusion.control.executor.inline import InlineExecutor

        return InlineExecutor(lambda: ModelRunner(config, info))
    from vllm_omni.diffusion.control.executor.multiproc import MultiprocExecutor

    launched = early.take(replica_index) if early else None
    return MultiprocExecutor(config.for_worker(str(info.path)), replica_index=replica_index, launched=launched)
