"""Workers that are launched before their executor exists: as new interpreters and as forks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from testbed.fakes import FakeRunner, make_config
from testbed.patience import wait_for
from tests.diffusion.control.executor.workers import closing, is_alive, name_of
from vllm_omni.diffusion.control.executor import early
from vllm_omni.diffusion.control.executor.early import MOST_WORKERS, launch_early
from vllm_omni.diffusion.control.executor.launch import Launched, LaunchedReplica, interpreter_launcher
from vllm_omni.diffusion.control.executor.multiproc import MultiprocExecutor
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.plan import StepPlan
from vllm_omni.errors import ConfigError, WorkerDiedError


async def test_an_executor_takes_over_the_workers_that_run_and_starts_new_ones_later() -> None:
    config = make_config(parallel=DiffusionParallelConfig(2))
    replica = LaunchedReplica(config, 0, interpreter_launcher(name_of(FakeRunner)))
    pids = [worker.process.pid for worker in replica.workers]
    async with closing(MultiprocExecutor(config, name_of(FakeRunner), launched=replica)) as executor:
        await executor.start()
        assert executor.worker_pids == pids
        executor.submit(StepPlan(7))
        assert (await executor.next_result()).step_id == 7
        await executor.start()
        assert not set(executor.worker_pids) & set(pids)


def test_modules_are_imported_before_the_first_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.joinpath("noted.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    replica = LaunchedReplica(make_config(), 0, interpreter_launcher(name_of(FakeRunner), ["noted"]))
    try:
        wait_for(tmp_path.joinpath("imported").exists)
    finally:
        replica.close()


async def test_a_failed_import_is_the_workers_last_words() -> None:
    replica = LaunchedReplica(make_config(), 0, interpreter_launcher(name_of(FakeRunner), ["no_such_module"]))
    async with closing(MultiprocExecutor(make_config(), name_of(FakeRunner), launched=replica)) as executor:
        with pytest.raises(WorkerDiedError, match="No module named 'no_such_module'"):
            await executor.start()


async def test_closing_an_executor_that_never_started_ends_its_workers() -> None:
    replica = LaunchedReplica(make_config(), 0, interpreter_launcher(name_of(FakeRunner)))
    (pid,) = [worker.process.pid for worker in replica.workers]
    await MultiprocExecutor(make_config(), name_of(FakeRunner), launched=replica).close()
    assert not is_alive(pid)


def test_workers_that_nobody_takes_end_with_the_context() -> None:
    with launch_early(make_config(model="demo", parallel=DiffusionParallelConfig(data_parallel_size=2))) as early:
        replicas = [early.take(0), early.take(1)]
        assert all(replicas)
        assert early.take(0) is None
        for replica in replicas:
            assert replica is not None
            replica.close()
    with launch_early(make_config(model="demo")):
        (worker,) = psutil.Process().children()
    assert not worker.is_running()


def test_a_worker_that_cannot_be_started_leaves_none_of_other_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = interpreter_launcher(name_of(FakeRunner))
    started: list[Launched] = []

    def launch_once(name: str, inherited_fds: Sequence[int]) -> Launched:
        if started:
            raise WorkerDiedError(f"{name} cannot be started: no memory")
        started.append(launch(name, inherited_fds))
        return started[0]

    monkeypatch.setattr(early, "_launcher", lambda modules: launch_once)
    with pytest.raises(WorkerDiedError, match=r"^replica 1 rank 0 cannot be started: no memory$"):
        launch_early(make_config(model="demo", parallel=DiffusionParallelConfig(data_parallel_size=2)))
    assert not is_alive(started[0].process.pid)


@pytest.mark.parametrize(
    "settings",
    [
        {"distributed_executor_backend": "uni"},
        {"parallel": DiffusionParallelConfig(ulysses_degree=MOST_WORKERS + 1)},
    ],
)
def test_other_executors_and_large_layouts_start_later(settings: dict[str, object]) -> None:
    with launch_early(make_config(model="demo", **settings)) as early:
        assert early.take(0) is None
        assert psutil.Process().children() == []


def test_a_folder_without_a_pipeline_class_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    tmp_path.joinpath("model_index.json").write_text("{}")
    with pytest.raises(ConfigError, match="_class_name"):
        launch_early(make_config(model=str(tmp_path)))
    assert psutil.Process().children() == []


# Forks need a process with one Python thread, which pytest's own may not be.
FORK = f"""
import asyncio, json, os, psutil, signal, socket
from functools import partial
from tqdm import tqdm
from testbed.fakes import FakeRunner, make_config
from testbed.patience import wait_for
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.control.executor.launch import LaunchedReplica, fork_launcher
from vllm_omni.diffusion.control.executor.multiproc import MultiprocExecutor
from vllm_omni.diffusion.messages.plan import StepPlan
from vllm_omni.diffusion.compute.worker.main import serve_parent

RUNNER = {name_of(FakeRunner)!r}
secret = open(os.devnull)

def serve(name, socket_fd, parent_pid):
    serve_parent(name, socket_fd, parent_pid, RUNNER)

async def main():
    config = make_config(parallel=DiffusionParallelConfig(2))
    replica = LaunchedReplica(config, 0, fork_launcher(serve))
    executor = MultiprocExecutor(config, RUNNER, launched=replica)
    pids = [worker.process.pid for worker in replica.workers]
    await executor.start()
    executor.submit(StepPlan(7))
    report = {{
        "took_over": executor.worker_pids == pids,
        "step_id": (await executor.next_result()).step_id,
        "sessions": [os.getsid(pid) == pid for pid in pids],
        "stdin": [os.readlink(f"/proc/{{pid}}/fd/0") for pid in pids],
        "fds": [len(os.listdir(f"/proc/{{pid}}/fd")) for pid in pids],
        "parent": [psutil.Process(pid).ppid() == os.getpid() for pid in pids],
    }}
    os.kill(pids[1], 9)
    try:
        await executor.next_result()
    except Exception as error:
        report["death"] = str(error)
    await executor.start()
    report["fresh"] = not set(executor.worker_pids) & set(pids)
    await executor.close()
    report["left"] = len(psutil.Process().children())
    print(json.dumps(report))

def tell_handlers(name, socket_fd, parent_pid):
    defaults = [signal.getsignal(number) is signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)]
    tqdm.get_lock().acquire()  # and die with it
    socket.socket(fileno=socket_fd).send(bytes(defaults))
    os._exit(0)

signal.signal(signal.SIGTERM, lambda *_: None)
lock = tqdm.get_lock()
replica = LaunchedReplica(make_config(), 0, fork_launcher(tell_handlers))
assert replica.workers[0].channel.recv(3) == bytes([True, True]), "the parent's handlers end the parent's things"
replica.close()
assert lock.mp_lock.acquire(False), "the child's death keeps the lock of the parent's progress bars"
lock.mp_lock.release()

replica = LaunchedReplica(make_config(), 0, fork_launcher(serve))
pid = replica.workers[0].process.pid
replica.close()
assert not psutil.pid_exists(pid)
asyncio.run(main())
"""


def test_a_fork_is_a_worker_like_any_other() -> None:
    run = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report.pop("death").endswith("was killed by signal 9")
    # 0, 1, 2, the channel, and what the child opens itself; neither the parent's file nor a sibling's channel.
    assert max(report.pop("fds")) <= 6
    assert report == {
        "took_over": True,
        "step_id": 7,
        "sessions": [True, True],
        "stdin": [os.devnull, os.devnull],
        "parent": [True, True],
        "fresh": True,
        "left": 0,
    }
