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
from typing import NoReturn

from vllm_omni.diffusion.compute.startup.compile_cache import keep_compiled_code
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult
from vllm_omni.diffusion.messages.worker import (
    HEARTBEAT_SECONDS,
    Abort,
    Died,
    Done,
    Execute,
    Heartbeat,
    MakeRunner,
    RankInfo,
    Ready,
    Runner,
    Start,
    ToWorker,
)
from vllm_omni.errors import ConfigError
from vllm_omni.logs import QueuedStreams, fill_standard_descriptors, logging_level
from vllm_omni.processes.channel import BlockingChannel
from vllm_omni.processes.parent_death import die_with_parent

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
    """Run a worker in this process until the parent ends.

    preload: modules to import while the parent's first message has not come yet.
    """
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
    process_exit = ProcessExit(channel, streams)
    try:
        logging.getLogger("vllm_omni").setLevel(logging_level())
        for module in preload:
            import_module(module)
        run_worker(channel, runner_name, process_exit)
    except EOFError:  # the parent ended before its first message
        streams.leave(0)
    except Exception as error:  # the parent must learn of any error
        process_exit.report(error)


class ProcessExit:
    """Ways in which a worker process ends itself, after its queued log lines are written."""

    def __init__(self, channel: BlockingChannel[ToWorker], streams: QueuedStreams) -> None:
        self._channel = channel
        self._streams = streams

    def report(self, error: Exception) -> NoReturn:
        """Send `error`, which is being handled, to the parent and end."""
        with contextlib.suppress(OSError):  # the parent may have ended
            self._channel.send(Died(str(error), traceback.format_exc(), isinstance(error, ConfigError)))
        self._streams.leave(1)

    def log_error(self) -> NoReturn:
        """Log the exception that is being handled and end."""
        traceback.print_exc()
        self._streams.leave(1)


def run_worker(channel: BlockingChannel[ToWorker], runner_name: str, process_exit: ProcessExit) -> NoReturn:
    """Load the model, send Ready, then execute plans as they come."""
    start = channel.receive()
    assert isinstance(start, Start)
    receiver = MessageReceiver(channel, process_exit)
    receiver.start()  # before loading: a rank that loads must send heartbeats and end with the parent
    module, _, name = runner_name.partition(":")
    make_runner: MakeRunner = getattr(import_module(module), name)
    runner = receiver.runner = make_runner(start.config, start.rank_info)
    channel.send(Ready(runner.start(start.first)))
    sender = ResultSender(channel, process_exit)
    if runner.launches_ahead:
        sender.start()
    while True:
        step = runner.launch(receiver.plans.get())
        if runner.launches_ahead:
            sender.steps.put(step)
        else:
            channel.send(Done(step()))


class ResultSender(threading.Thread):
    """Thread that waits for launched steps and sends their results while the next step is launched."""

    def __init__(self, channel: BlockingChannel[ToWorker], process_exit: ProcessExit) -> None:
        super().__init__(daemon=True, name="results")
        self._process_exit = process_exit
        self.steps: queue.SimpleQueue[Callable[[], StepResult]] = queue.SimpleQueue()
        self._channel = channel

    def run(self) -> None:
        try:
            while True:
                self._channel.send(Done(self.steps.get()()))
        except Exception as error:  # the parent must learn of any error
            self._process_exit.report(error)


class MessageReceiver(threading.Thread):
    """Thread that receives the parent's messages and sends heartbeats; it ends the process when the parent ends."""

    def __init__(self, channel: BlockingChannel[ToWorker], process_exit: ProcessExit) -> None:
        super().__init__(daemon=True, name="channel")
        self._process_exit = process_exit
        self.plans: queue.SimpleQueue[StepPlan] = queue.SimpleQueue()
        self.runner: Runner | None = None
        self._channel = channel

    def run(self) -> None:
        try:
            self._receive()
        except (EOFError, OSError):
            os._exit(0)
        except BaseException:  # without this thread the worker would get no message
            self._process_exit.log_error()

    def _receive(self) -> NoReturn:
        beat_at = time.monotonic()
        while True:
            if (now := time.monotonic()) >= beat_at:
                self._channel.send_if_free(Heartbeat())
                beat_at = now + HEARTBEAT_SECONDS
            with contextlib.suppress(TimeoutError):
                self._handle(self._channel.receive(timeout=beat_at - now))

    def _handle(self, message: ToWorker) -> None:
        if isinstance(message, Execute):
            self.plans.put(message.plan)
        else:
            assert isinstance(message, Abort)
            assert self.runner is not None, "aborts follow plans, and plans follow Ready"
            self.runner.abort(message.request_ids)


if __name__ == "__main__":
    main()
