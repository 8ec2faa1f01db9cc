"""Main function of `vllm-omni` and of `vllm serve MODEL --omni`: vLLM's command calls it if it sees `--omni`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from vllm_omni.diffusion.control.compiled_packages import check_compiled_packages
from vllm_omni.entrypoints.cli import calibrate, plan
from vllm_omni.entrypoints.cli.args import ServeArgs, parse_args
from vllm_omni.entrypoints.cli.commands import CALIBRATE, PLAN, program_name
from vllm_omni.entrypoints.server.signals import StopSignals
from vllm_omni.errors import ConfigError, to_one_line
from vllm_omni.logs import QueuedStreams, fill_standard_descriptors, logging_level

if TYPE_CHECKING:
    from vllm_omni.diffusion.control.executor.launch import EarlyWorkers

FAILED_EXIT_CODE = 1
USAGE_EXIT_CODE = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 after a clean stop, 1 when the engine failed, 2 for a wrong setting.

    `plan` exits with 0 if the model fits, and with 1 if it does not.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    fill_standard_descriptors()
    try:
        words = [word for word in words if word != "--omni"]  # vLLM's command has read it
        if words[:1] == [CALIBRATE]:
            calibrate_args = calibrate.parse_args(words[1:])
            check_compiled_packages()
            calibrate.calibrate(calibrate_args)
            sys.exit(0)
        if words[:1] == [PLAN]:
            plan_args = plan.parse_args(words[1:])
            check_compiled_packages()
            sys.exit(plan.plan(plan_args))
        streams = QueuedStreams()
        with StopSignals(streams.leave) as signals:
            args = parse_args(words, program_name(sys.argv[0]))
            logging_level()  # raises ConfigError for a wrong one before anything is loaded
            check_compiled_packages()
            # Workers import while the server does. They start before the log's thread, because they may be forks.
            from vllm_omni.diffusion.control.executor.early import launch_early

            with launch_early(args.config) as workers:
                serve_and_leave(args, signals, streams, workers)
    except ConfigError as error:
        _print_error(error)
        sys.exit(USAGE_EXIT_CODE)


def serve_and_leave(
    args: ServeArgs, signals: StopSignals, streams: QueuedStreams, workers: EarlyWorkers | None = None
) -> NoReturn:
    """Serve, then end the process without the interpreter's exit, which would wait for the threads of all pools."""
    streams.install()
    try:
        from vllm_omni.entrypoints.cli.serve import serve  # late: it imports the engine and the HTTP app

        code = serve(args, signals, streams, workers)
    except ConfigError as error:
        _print_error(error)
        code = USAGE_EXIT_CODE
    except BaseException:  # any error: no caller is left to report it
        traceback.print_exc()
        code = FAILED_EXIT_CODE
    streams.leave(code)


def _print_error(error: ConfigError) -> None:
    # Our name also under vLLM's command: the user must know which program the error comes from.
    print(f"vllm-omni: error: {to_one_line(str(error))}", file=sys.stderr)


if __name__ == "__main__":
    main()
