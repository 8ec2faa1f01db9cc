"""Launch workers before the command's own imports, because the workers' imports are the longest part of a start."""

from __future__ import annotations

import sys
import threading
from functools import partial
from typing import Any

from vllm_omni.diffusion.catalog.find_folder import local_path
from vllm_omni.diffusion.catalog.registry import family_of
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
    """Launch the worker processes of `config`; its executor takes them over.

    Launches none for other executors than `mp` and for large layouts. Raises ConfigError for a model folder without a
    pipeline class, WorkerDiedError when no process can be started.
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
    """Module of the model's pipeline, or nothing while the model is not in a local folder."""
    path = local_path(model)
    is_folder = (path / "model_index.json").is_file()
    return [f"vllm_omni.diffusion.compute.families.{family_of(path)}.pipeline"] if is_folder else []


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
