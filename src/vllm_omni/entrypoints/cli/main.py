"""The command: `vllm serve MODEL --omni` (vLLM hands over to `main` when it sees `--omni`) and `vllm-omni`'s own."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vllm_omni.entrypoints.cli import calibrate
from vllm_omni.entrypoints.cli.args import parse_args
from vllm_omni.entrypoints.cli.commands import program_name
from vllm_omni.errors import ConfigError

USAGE_EXIT_CODE = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 after a clean stop, 1 when the engine failed, 2 for a wrong setting."""
    words = sys.argv[1:] if argv is None else list(argv)
    prog = program_name(sys.argv[0])
    try:
        words = [word for word in words if word != "--omni"]  # it has done its work
        if words[:1] == [calibrate.COMMAND]:
            calibrate.calibrate(calibrate.parse_args(words[1:]))
            sys.exit(0)
        args = parse_args(words, prog)
        from vllm_omni.diffusion.executor.early import launch_early

        with launch_early(args.config) as workers:
            # After the flags, and while the workers import: it imports the engine and the HTTP app.
            from vllm_omni.entrypoints.cli.serve import serve

            code = serve(args, workers)
    except ConfigError as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        code = USAGE_EXIT_CODE
    sys.exit(code)


if __name__ == "__main__":
    main()
