"""Launch workers before the command's own imports, because the workers' imports are the longest part of a start."""

from __future__ import annotations

import sys
import threading
from functools import partial
from typing import Any

from vllm_omni.diffusion.catalog.find_folder import local_path
from vllm_omni.diffusion.catalog.folder_files import MODEL_INDEX
from vllm_omni.diffusion.catalog.registry import family_of, pipeline_module
from vllm_omni.diffusion.compute.worker.main import DEFAULT_RUNNER, serve_parent
from vllm_omni.diffusion.control.executor.launch import (
    EarlyWorkers,
    LaunchedReplica,
    LaunchWorker,
    fork_launcher,
    interpreter_launcher,
)
from vllm_omni.diffusion.data import OmniDiffusionConfig

MOST_WORKERS = 8
"""Layouts with more workers start later, after the check that this machine has the devices."""
_MODULES = (
    "vllm_omni.diffusion.compute.worker.runner",
    "diffusers.models.modeling_utils",
    "transformers.modeling_utils",
)
"""Modules that every model needs and that take long to import."""


def launch_early(config: OmniDiffusionConfig) -> EarlyWorkers:
    """Launch the workers of `config`, if they are few processes. Raises ConfigError or WorkerDiedError."""
    parallel = config.parallel
    if config.distributed_executor_backend != "mp" or parallel.world_size > MOST_WORKERS:
        return EarlyWorkers()
    path = local_path(config.model)
    is_folder = (path / MODEL_INDEX).is_file()  # otherwise nothing is known of the model yet
    launch = _launcher([*_MODULES, *([pipeline_module(family_of(path))] if is_folder else ())])
    replicas: list[LaunchedReplica] = []
    try:
        for index in range(parallel.data_parallel_size):
            replicas.append(LaunchedReplica(config, index, launch))
    except BaseException:  # also an interrupt must leave no process behind
        EarlyWorkers(replicas).close()
        raise
    return EarlyWorkers(replicas)


def _launcher(modules: list[str]) -> LaunchWorker:
    """Choose how to launch: by a fork if this process has imported PyTorch and uses no GPU (a fork cannot use one)."""
    if "torch" in sys.modules and threading.active_count() == 1:
        from vllm_omni.diffusion.compute.device.kinds import can_use_gpus

        if not can_use_gpus():
            return fork_launcher(partial(_serve, modules))
    return interpreter_launcher(DEFAULT_RUNNER, modules)


def _serve(modules: list[str], name: str, socket_fd: int, parent_pid: int) -> Any:
    from setproctitle import setproctitle  # installed with vLLM, which every process that forks has imported

    setproctitle(f"python -m vllm_omni.diffusion.compute.worker.main --name={name}")
    serve_parent(name, socket_fd, parent_pid, preload=modules)
