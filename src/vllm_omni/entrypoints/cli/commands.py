"""Names of commands. Ours is `serve`; vLLM also calls us for its other commands if their line has `--omni`."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import PurePath

from vllm_omni.errors import ConfigError

SERVE = "serve"
OTHER_COMMANDS = {
    "bench": "vLLM's has no backend for the images API; measure a running server from a checkout of vllm-omni: "
    "python -m benchmarks.serving --base-url http://127.0.0.1:8000/v1",
    "chat": "vLLM's prints text only; ask a running server with the OpenAI SDK or curl: POST /v1/images/generations",
    "collect-env": "run it without --omni: vllm collect-env",
    "complete": "no text is made; ask a running server with the OpenAI SDK or curl: POST /v1/images/generations",
    "download-kernels": "run it without --omni: vllm download-kernels",
    "launch": "it starts parts of a server of language models",
    "preload": "it is for language models",
    "run-batch": "it is for language models; send the requests to a running server: POST /v1/images/generations",
    "snapshot": "it is for language models",
}
"""vLLM's other commands -> what to run instead."""
_WITHOUT_COMMAND = ("-h", "--help", "-v", "--version")


def program_name(argv0: str) -> str:
    """`vllm-omni` if started under that name or as our module, otherwise `vllm`, whose command has called us."""
    path = PurePath(argv0)
    is_ours = path.name == "vllm-omni" or path.parts[-4:] == ("vllm_omni", "entrypoints", "cli", "main.py")
    return "vllm-omni" if is_ours else "vllm"


def check_command(words: Sequence[str], serve_line: str) -> None:
    """Raise ConfigError, with what to run instead, unless the words begin with `serve`, `--help` or `--version`."""
    command = words[0] if words else ""
    if command == SERVE or command in _WITHOUT_COMMAND:
        return
    if not command or command.startswith("-"):
        raise ConfigError(f"a command is missing: {serve_line}")
    if command in OTHER_COMMANDS:
        raise ConfigError(f"{command} is not for image servers: {OTHER_COMMANDS[command]}")
    close = get_close_matches(command, [SERVE, *OTHER_COMMANDS], 1)
    advice = f"did you mean {close[0]}?" if close else f"the command is {serve_line}"
    raise ConfigError(f"{command!r} is no command: {advice}")
