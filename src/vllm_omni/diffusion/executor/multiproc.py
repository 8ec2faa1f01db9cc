"""`mp`: worker processes on this machine, one a device (one device so far)."""

from __future__ import annotations

import asyncio
import atexit
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.plan import StepPlan, StepResult, WorkerReady
from vllm_omni.diffusion.worker.channel import AsyncChannel
from vllm_omni.diffusion.worker.contract import Abort, Died, Done, Execute, FromWorker, Ready, Start, Stop, ToWorker
from vllm_omni.diffusion.worker.main import DEFAULT_RUNNER
from vllm_omni.errors import ConfigError, WorkerDiedError

_STOP_SECONDS = 5.0
"""How long a worker that was asked to end may take before it is killed."""


class WorkerProcess:
    """One worker process and the channel to it. Made on a running event loop."""

    def __init__(self, runner_name: str) -> None:
        ours, theirs = socket.socketpair()
        # Not by fork, nor by importing the user's script again: an interpreter of its own. `-P`: what lies in
        # the current folder is no part of it. Its own session: a terminal's Ctrl-C goes to the parent alone.
        command = [sys.executable, "-P", "-m", "vllm_omni.diffusion.worker.main"]
        command += [f"--socket-fd={theirs.fileno()}", f"--parent-pid={os.getpid()}", f"--runner={runner_name}"]
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
            )
        self._channel: AsyncChannel[FromWorker] = AsyncChannel(ours, FromWorker)
        self._parent_pid = os.getpid()
        atexit.register(self._kill_at_exit)  # for programs that never call close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToWorker) -> None:
        self._channel.send(message)

    async def receive(self) -> Ready | Done:
        """Raises WorkerDiedError, or ConfigError where the worker says that a setting is at fault."""
        try:
            message = await self._channel.receive()
        except EOFError:
            raise WorkerDiedError(f"worker {self.pid} {await self._how_it_ended()}") from None
        if not isinstance(message, Died):
            return message
        if message.is_config_error:
            raise ConfigError(message.message)
        raise WorkerDiedError(f"worker {self.pid} failed: {message.message}\n{message.traceback}")

    async def close(self) -> None:
        """Ask, then kill, and reap."""
        self.send(Stop())
        try:
            await self._exit_code()
        finally:
            self.kill()
            self._channel.close()

    def kill(self) -> None:
        """End the process whatever it does, and reap it."""
        self._process.kill()
        self._process.wait()
        atexit.unregister(self._kill_at_exit)

    def _kill_at_exit(self) -> None:
        if os.getpid() == self._parent_pid:  # not in a child that the program forked
            self.kill()

    async def _how_it_ended(self) -> str:
        code = await self._exit_code()
        if code is None:
            return "closed its channel"
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    async def _exit_code(self) -> int | None:
        """Of the process once it has ended; None when it still runs after `_STOP_SECONDS`.

        Needs no thread: a program that never calls close() gets here when threads can no longer be started.
        """
        if self._process.poll() is None:
            ended, loop = asyncio.Event(), asyncio.get_running_loop()
            descriptor = os.pidfd_open(self._process.pid)
            loop.add_reader(descriptor, ended.set)
            try:
                await asyncio.wait_for(ended.wait(), _STOP_SECONDS)
            except TimeoutError:
                return None
            finally:
                loop.remove_reader(descriptor)
                os.close(descriptor)
        return self._process.wait()


class MultiprocExecutor:
    def __init__(self, config: OmniDiffusionConfig, runner_name: str = DEFAULT_RUNNER) -> None:
        """`runner_name`: "module:function", called in the worker with the config, returns its Runner."""
        self._config = config
        self._runner_name = runner_name
        self._workers: list[WorkerProcess] = []

    @property
    def worker_pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    async def start(self) -> WorkerReady:
        await self.close()
        self._workers = [WorkerProcess(self._runner_name)]
        try:
            for worker in self._workers:
                worker.send(Start(self._config))
            replies = [await worker.receive() for worker in self._workers]
        except BaseException:
            await self.close()
            raise
        first = replies[0]
        assert isinstance(first, Ready)
        return first.ready

    def submit(self, plan: StepPlan) -> None:
        for worker in self._workers:
            worker.send(Execute(plan))

    def abort(self, request_ids: Sequence[str]) -> None:
        for worker in self._workers:
            worker.send(Abort(list(request_ids)))

    async def next_result(self) -> StepResult:
        message = await self._workers[0].receive()
        assert isinstance(message, Done)
        return message.result

    async def close(self) -> None:
        workers, self._workers = self._workers, []
        await asyncio.gather(*(worker.close() for worker in workers))
