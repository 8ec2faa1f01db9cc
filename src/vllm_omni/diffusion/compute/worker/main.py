"""A worker process: `python -m vllm_omni.diffusion.compute.worker.main --socket-fd N --parent-pid P`.

The parent's end of the socket is also the lifeline: when it closes, for whatever reason, the worker ends. Where a
child that the parent forked holds a copy of that end, the kernel ends the worker with its parent (`parent_death.py`).
A thread of its own takes messages off the socket while a step runs, so an abort overtakes the plans that were
sent before it, and says meanwhile that the worker lives.
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


def make_model_runner(config: OmniDiffusionConfig, place: RankInfo) -> Runner:
    from vllm_omni.diffusion.catalog.registry import load_model_info
    from vllm_omni.diffusion.compute.worker.runner import ModelRunner

    return ModelRunner(config, load_model_info(config.model, config.load_format), place)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A worker process of the engine; not for use by hand.")
    parser.add_argument("--socket-fd", type=int, required=True, help="the worker's end of the channel")
    parser.add_argument("--parent-pid", type=int, required=True, help="the worker ends when this process has")
    parser.add_argument("--runner", default=DEFAULT_RUNNER, help="module:function that makes a Runner")
    parser.add_argument("--preload", action="append", default=[], help="module to import before the first message")
    parser.add_argument("--name", default="worker", help="of this worker in its log lines")
    options = parser.parse_args(arguments)
    serve_parent(options.name, options.socket_fd, options.parent_pid, options.runner, options.preload)


def serve_parent(
    name: str, socket_fd: int, parent_pid: int, runner_name: str = DEFAULT_RUNNER, preload: Sequence[str] = ()
) -> NoReturn:
    """Be a worker until the parent or the process ends.

    `preload`: modules to import before the parent's first message, which may come late.
    """
    die_with_parent(parent_pid)
    fill_standard_descriptors()
    streams = QueuedStreams()
    streams.install()  # before the libraries that keep sys.stderr
    # The parent decides when a worker ends; a Ctrl-C or a service manager that signals the whole group must
    # not take it from a parent that is finishing its requests.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(format=f"%(levelname)s %(asctime)s [vllm-omni {name}] %(message)s")
    keep_compiled_code()
    channel: BlockingChannel[ToWorker] = BlockingChannel(socket.socket(fileno=socket_fd), ToWorker)
    ending = Ending(channel, streams)
    try:
        logging.getLogger("vllm_omni").setLevel(logging_level())
        for module in preload:
            import_module(module)
        run_worker(channel, runner_name, ending)
    except EOFError:  # the parent is gone before it said anything
        streams.leave(0)
    except Exception as error:  # whatever it was, the parent must hear of it
        ending.die(error)


class Ending:
    """The ways a worker process ends by itself. Queued log lines are written first."""

    def __init__(self, channel: BlockingChannel[ToWorker], streams: QueuedStreams) -> None:
        self._channel = channel
        self._streams = streams

    def die(self, error: Exception) -> NoReturn:
        """Tell the parent of `error`, which is being handled, and end."""
        with contextlib.suppress(OSError):  # the parent may be gone
            self._channel.send(Died(str(error), traceback.format_exc(), isinstance(error, ConfigError)))
        self._streams.leave(1)

    def break_down(self) -> NoReturn:
        """Log the exception that is being handled, and end."""
        traceback.print_exc()
        self._streams.leave(1)


def run_worker(channel: BlockingChannel[ToWorker], runner_name: str, ending: Ending) -> NoReturn:
    """Load, say so, then run plans as they come."""
    start = channel.receive()
    assert isinstance(start, Start)
    listener = Listener(channel, ending)
    listener.start()  # first: a rank that loads, or waits for others, must show that it lives, and end with the parent
    runner = listener.runner = _load(runner_name)(start.config, start.rank_info)
    channel.send(Ready(runner.start(start.first)))
    answerer = Answerer(channel, ending)
    if runner.launches_ahead:
        answerer.start()
    while True:
        step = runner.launch(listener.plans.get())
        if runner.launches_ahead:
            answerer.steps.put(step)
        else:
            channel.send(Done(step()))


def _load(runner_name: str) -> MakeRunner:
    module, _, name = runner_name.partition(":")
    make_runner: MakeRunner = getattr(import_module(module), name)
    return make_runner


class Answerer(threading.Thread):
    """Waits for the steps that were launched and sends their results, while the next one is launched."""

    def __init__(self, channel: BlockingChannel[ToWorker], ending: Ending) -> None:
        super().__init__(daemon=True, name="answers")
        self._ending = ending
        self.steps: queue.SimpleQueue[Callable[[], StepResult]] = queue.SimpleQueue()
        self._channel = channel

    def run(self) -> None:
        try:
            while True:
                self._channel.send(Done(self.steps.get()()))
        except Exception as error:  # as in `main`
            self._ending.die(error)


class Listener(threading.Thread):
    """Takes the parent's messages off the channel and sends Beats; ends the process when the parent is gone."""

    def __init__(self, channel: BlockingChannel[ToWorker], ending: Ending) -> None:
        super().__init__(daemon=True, name="channel")
        self._ending = ending
        self.plans: queue.SimpleQueue[StepPlan] = queue.SimpleQueue()
        self.runner: Runner | None = None
        self._channel = channel

    def run(self) -> None:
        try:
            self._listen()
        except (EOFError, OSError):
            os._exit(0)
        except BaseException:  # without this thread the worker would be deaf
            self._ending.break_down()

    def _listen(self) -> NoReturn:
        beat_at = time.monotonic()
        while True:
            if (now := time.monotonic()) >= beat_at:
                self._channel.send_if_free(Heartbeat())
                beat_at = now + HEARTBEAT_SECONDS
            with contextlib.suppress(TimeoutError):
                self._take(self._channel.receive(timeout=beat_at - now))

    def _take(self, message: ToWorker) -> None:
        if isinstance(message, Execute):
            self.plans.put(message.plan)
        else:
            assert isinstance(message, Abort)
            assert self.runner is not None, "aborts follow plans, and plans follow Ready"
            self.runner.abort(message.request_ids)


if __name__ == "__main__":
    main()
