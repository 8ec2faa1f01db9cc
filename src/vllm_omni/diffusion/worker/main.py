"""A worker process: `python -m vllm_omni.diffusion.worker.main --socket-fd N --parent-pid P`.

The parent's end of the socket is also the lifeline: when it closes, for whatever reason, the worker ends.
The reader thread takes messages off the socket while a step runs, so an abort overtakes the plans that were
sent before it.
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
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import NoReturn

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.plan import StepPlan
from vllm_omni.diffusion.worker.channel import BlockingChannel
from vllm_omni.diffusion.worker.contract import Abort, Died, Done, Execute, Ready, Runner, Start, Stop, ToWorker
from vllm_omni.errors import ConfigError

DEFAULT_RUNNER = "vllm_omni.diffusion.worker.main:make_model_runner"
_PARENT_CHECK_SECONDS = 1.0


def make_model_runner(config: OmniDiffusionConfig) -> Runner:
    from vllm_omni.diffusion.registry import load_model_info
    from vllm_omni.diffusion.worker.runner import ModelRunner

    return ModelRunner(config, load_model_info(config.model))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A worker process of the engine; not for use by hand.")
    parser.add_argument("--socket-fd", type=int, required=True, help="the worker's end of the channel")
    parser.add_argument("--parent-pid", type=int, required=True, help="the worker ends when this process has")
    parser.add_argument("--runner", default=DEFAULT_RUNNER, help="module:function that makes a Runner of a config")
    options = parser.parse_args(arguments)
    # The parent decides when a worker ends; a Ctrl-C or a service manager that signals the whole group must
    # not take it from a parent that is finishing its requests.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(format="%(levelname)s %(asctime)s [worker] %(message)s")
    logging.getLogger("vllm_omni").setLevel(logging.INFO)
    channel: BlockingChannel[ToWorker] = BlockingChannel(socket.socket(fileno=options.socket_fd), ToWorker)
    try:
        run_worker(channel, options.runner, options.parent_pid)
    except (EOFError, OSError):
        os._exit(0)  # the parent is gone
    except Exception as error:  # whatever it was, the parent must hear of it
        died = Died(str(error), traceback.format_exc(), isinstance(error, ConfigError))
        with contextlib.suppress(OSError):
            channel.send(died)
        os._exit(1)


def run_worker(channel: BlockingChannel[ToWorker], runner_name: str, parent_pid: int) -> NoReturn:
    """Load, say so, then run plans as they come."""
    start = channel.receive()
    assert isinstance(start, Start)
    runner = _load(runner_name)(start.config)
    plans: queue.SimpleQueue[StepPlan] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, runner, plans, parent_pid), daemon=True, name="channel").start()
    ready = runner.start()
    channel.send(Ready(ready))
    while True:
        result = runner.execute(plans.get())
        channel.send(Done(result))


def _load(runner_name: str) -> Callable[[OmniDiffusionConfig], Runner]:
    module, _, name = runner_name.partition(":")
    make_runner: Callable[[OmniDiffusionConfig], Runner] = getattr(import_module(module), name)
    return make_runner


def _read(
    channel: BlockingChannel[ToWorker], runner: Runner, plans: queue.SimpleQueue[StepPlan], parent_pid: int
) -> None:
    """The reader thread. Ends the process when the parent asks for it or is gone."""
    try:
        while True:
            try:
                message = channel.receive(timeout=_PARENT_CHECK_SECONDS)
            except TimeoutError:
                # A child that the parent forked may hold a copy of its end of the socket open.
                if os.getppid() != parent_pid:
                    os._exit(0)
                continue
            if isinstance(message, Execute):
                plans.put(message.plan)
            elif isinstance(message, Abort):
                runner.abort(message.request_ids)
            else:
                assert isinstance(message, Stop)
                os._exit(0)
    except (EOFError, OSError):
        os._exit(0)
    except BaseException:  # without this thread the worker would be deaf
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
