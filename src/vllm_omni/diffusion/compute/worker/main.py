"""A worker process: `python -m vllm_omni.diffusion.compute.worker.main --socket-fd N --parent-pid P`.

The worker ends when the parent's end of the socket closes. If a forked child of the parent keeps a copy of that end
open, the kernel ends the worker with its parent (`parent_death.py`).
A separate thread receives messages while a step runs, so an abort overtakes plans that were sent before it. The same
thread sends heartbeats, which show that the worker is alive.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.adapters import AdapterRead
from vllm_omni.diffusion.messages.plan import StepResult
from vllm_omni.diffusion.messages.worker import (
    HEARTBEAT_SECONDS,
    Abort,
    Died,
    Done,
    Execute,
    ForgetAdapters,
    HasMoved,
    HasReadAdapter,
    Heartbeat,
    MakeRunner,
    RankInfo,
    ReadAdapter,
    Ready,
    Runner,
    Sleep,
    Start,
    ToWorker,
    WakeUp,
)
from vllm_omni.errors import ConfigError
from vllm_omni.logs import QueuedStreams, fill_standard_descriptors, logging_level
from vllm_omni.processes.channel import BlockingChannel
from vllm_omni.processes.parent_death import die_with_parent

CODE_FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "omni_torch_compile", "TRITON_CACHE_DIR": "omni_triton"}
"""Environment variable -> default name of the folder. PyTorch and Triton read these variables when they compile; no
other setting covers all files that they keep."""
DEFAULT_RUNNER = "vllm_omni.diffusion.compute.worker.main:make_model_runner"


def make_model_runner(config: OmniDiffusionConfig, rank_info: RankInfo) -> Runner:
    from vllm_omni.diffusion.catalog.registry import load_model_info
    from vllm_omni.diffusion.compute.worker.runner import ModelRunner

    return ModelRunner(config, load_model_info(config.model, config.load_format), rank_info)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A worker process of the engine; not for use by hand.")
    parser.add_argument("--socket-fd", type=int, required=True, help="the worker's end of the channel")
    parser.add_argument("--parent-pid", type=int, required=True, help="the worker ends when this process ends")
    parser.add_argument("--runner", default=DEFAULT_RUNNER, help="module:function that makes a Runner")
    parser.add_argument("--preload", action="append", default=[], help="module to import before the first message")
    parser.add_argument("--name", default="worker", help="name of this worker in its log lines")
    options = parser.parse_args(arguments)
    serve_parent(options.name, options.socket_fd, options.parent_pid, options.runner, options.preload)


def serve_parent(
    name: str, socket_fd: int, parent_pid: int, runner_name: str = DEFAULT_RUNNER, preload: Sequence[str] = ()
) -> NoReturn:
    """Run a worker in this process until the parent ends. preload: modules to import before its first message."""
    die_with_parent(parent_pid)
    fill_standard_descriptors()
    streams = QueuedStreams()
    streams.install()  # first: some libraries keep a reference to sys.stderr
    # The parent ends its workers. A signal to the whole process group (Ctrl-C, a service manager) must not end them
    # while the parent finishes its requests.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(format=f"%(levelname)s %(asctime)s [vllm-omni {name}] %(message)s")
    keep_compiled_code()
    channel: BlockingChannel[ToWorker] = BlockingChannel(socket.socket(fileno=socket_fd), ToWorker)
    worker = Worker(channel, streams)
    try:
        logging.getLogger("vllm_omni").setLevel(logging_level())
        for module in preload:
            import_module(module)
        worker.run(runner_name)
    except EOFError:  # the parent ended before its first message
        streams.leave(0)
    except Exception as error:  # the parent must learn of any error
        worker.report(error)


def keep_compiled_code() -> None:
    """Make this process keep compiled code in vLLM's cache folder. Variables that are set already do not change."""
    # vLLM's rule for its cache folder, so that both keep their code in one place.
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("VLLM_CACHE_ROOT") or Path(user_cache, "vllm"))
    for variable, folder in CODE_FOLDERS.items():
        os.environ.setdefault(variable, str(root.expanduser() / folder))


class Worker:
    """The runner of this process, and the threads that exchange messages with the parent."""

    def __init__(self, channel: BlockingChannel[ToWorker], streams: QueuedStreams) -> None:
        """streams: write the queued log lines before the process ends."""
        self._channel = channel
        self._streams = streams
        self._runner: Runner | None = None
        self._work: queue.SimpleQueue[Execute | Sleep | WakeUp] = queue.SimpleQueue()
        """Messages for the main thread, in order."""
        self._steps: queue.SimpleQueue[Callable[[], StepResult]] = queue.SimpleQueue()
        """Launched steps, whose results are not sent yet."""

    def run(self, runner_name: str) -> NoReturn:
        """Load the model, send Ready, then execute plans as they come."""
        start = self._channel.receive()
        assert isinstance(start, Start)
        # Before loading: a rank that loads must send heartbeats and end with the parent.
        threading.Thread(target=self._receive, daemon=True, name="channel").start()
        module, _, name = runner_name.partition(":")
        make_runner: MakeRunner = getattr(import_module(module), name)
        runner = self._runner = make_runner(start.config, start.rank_info)
        self._channel.send(Ready(runner.start(start.first)))
        if runner.launches_ahead:
            threading.Thread(target=self._send_results, daemon=True, name="results").start()
        while True:
            work = self._work.get()
            if isinstance(work, Execute):
                self._launch(runner, work)
            else:  # no plan is in flight
                self._channel.send(HasMoved(runner.sleep() if isinstance(work, Sleep) else runner.wake_up()))

    def _launch(self, runner: Runner, work: Execute) -> None:
        step = runner.launch(work.plan)
        if runner.launches_ahead:
            self._steps.put(step)
        else:
            self._channel.send(Done(step()))

    def report(self, error: Exception) -> NoReturn:
        """Send `error`, which is being handled, to the parent and end the process."""
        with contextlib.suppress(OSError):  # the parent may have ended
            self._channel.send(Died(str(error), traceback.format_exc(), isinstance(error, ConfigError)))
        self._streams.leave(1)

    def _send_results(self) -> None:
        """Wait for launched steps and send their results, while the next step is launched."""
        try:
            while True:
                self._channel.send(Done(self._steps.get()()))
        except Exception as error:  # the parent must learn of any error
            self.report(error)

    def _receive(self) -> None:
        """Receive the parent's messages and send heartbeats; end the process when the parent ends."""
        beat_at = time.monotonic()
        try:
            while True:
                if (now := time.monotonic()) >= beat_at:
                    self._channel.send_if_free(Heartbeat())
                    beat_at = now + HEARTBEAT_SECONDS
                with contextlib.suppress(TimeoutError):
                    self._handle(self._channel.receive(timeout=beat_at - now))
        except (EOFError, OSError):
            os._exit(0)
        except BaseException:  # without this thread the worker would get no message
            traceback.print_exc()
            self._streams.leave(1)

    def _handle(self, message: ToWorker) -> None:
        if isinstance(message, Execute | Sleep | WakeUp):
            self._work.put(message)
            return
        assert self._runner is not None, "all other messages follow Ready"
        if isinstance(message, Abort):
            self._runner.abort(message.request_ids)
        elif isinstance(message, ReadAdapter):
            self._runner.read_adapter(message.key, self._report_adapter, message.kept)
        else:
            assert isinstance(message, ForgetAdapters)
            self._runner.forget_adapters(message.keys)

    def _report_adapter(self, report: AdapterRead) -> None:
        with contextlib.suppress(OSError):  # the parent may have ended
            self._channel.send(HasReadAdapter(report))


if __name__ == "__main__":
    main()
