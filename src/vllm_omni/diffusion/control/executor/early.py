"""Workers that start before the command imports what it needs itself: their imports are the longest part of a start."""

from __future__ import annotations

import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.catalog.find_folder import DEMO_MODEL, DEMO_MODEL_PATH
from vllm_omni.diffusion.catalog.registry import family_of
from vllm_omni.diffusion.compute.worker.main import DEFAULT_RUNNER, serve_parent
from vllm_omni.diffusion.control.executor.launch import EarlyWorkers, LaunchedReplica, LaunchWorker, fork, interpreter
from vllm_omni.diffusion.data import OmniDiffusionConfig

MOST_WORKERS = 8
"""Larger layouts start later, when it is known that this machine has so many devices."""
_MODULES = (
    "vllm_omni.diffusion.compute.worker.runner",
    "diffusers.models.modeling_utils",
    "transformers.modeling_utils",
)
"""Slow imports that every model needs."""


def launch_early(config: OmniDiffusionConfig) -> EarlyWorkers:
    """Start the worker processes of `config`, to be taken over by its executor.

    None are started for other executors and for large layouts: those start when their turn comes. Raises ConfigError
    for a model folder without a pipeline class, WorkerDiedError when the machine has no process to give.
    """
    parallel = config.parallel
    if config.distributed_executor_backend != "mp" or parallel.world_size > MOST_WORKERS:
        return EarlyWorkers()
    launch = _launcher([*_MODULES, *_pipeline_module(config.model)])
    replicas: list[LaunchedReplica] = []
    try:
        for index in range(parallel.data_parallel_size):
            replicas.append(LaunchedReplica(config, index, launch))
    except BaseException:  # also an interrupt must leave no process behind
        EarlyWorkers(replicas).close()
        raise
    return EarlyWorkers(replicas)


def _pipeline_module(model: str) -> list[str]:
    """The module of the model's pipeline, where its folder is at hand."""
    path = DEMO_MODEL_PATH if model == DEMO_MODEL else Path(model).expanduser()
    is_folder = (path / "model_index.json").is_file()
    return [f"vllm_omni.diffusion.compute.families.{family_of(path)}.pipeline"] if is_folder else []


def _launcher(modules: list[str]) -> LaunchWorker:
    """A fork where this process has imported PyTorch already and PyTorch uses no GPU, which no fork could use."""
    if "torch" in sys.modules and threading.active_count() == 1:
        from vllm_omni.diffusion.compute.device.kinds import can_use_gpus

        if not can_use_gpus():
            return fork(partial(_serve, modules))
    return interpreter(DEFAULT_RUNNER, modules)


def _serve(modules: list[str], name: str, socket_fd: int, parent_pid: int) -> Any:
    from setproctitle import setproctitle  # vLLM brings it: forks are made of processes that have imported vLLM

    setproctitle(f"python -m vllm_omni.diffusion.compute.worker.main --name={name}")
    serve_parent(name, socket_fd, parent_pid, preload=modules)
