"""Everything that the front end uses of vLLM: the file to check for a new vLLM release.

Written for vLLM 0.32. Imports are inside the functions, because `import vllm` takes seconds (it loads torch's
compiler); under `vllm serve` they are spent before we are called. Modules that import the language-model engine
(`vllm.entrypoints.launchers.{cli_args,launcher}`, another eight seconds) are not used: our flags repeat vLLM's names
and meaning, and a test compares them with vLLM's parser.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_omni.errors import ConfigError, to_one_line
from vllm_omni.logs import logging_level

if TYPE_CHECKING:
    import uvicorn

LOGGERS = ("vllm_omni", "vllm")


def make_parser(
    prog: str, description: str, explain_unknown: Callable[[Sequence[str], Iterable[str]], str]
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """(top-level parser, parser of its `serve` command), subclasses of vLLM's FlexibleArgumentParser.

    That class accepts dashes or underscores, `--config FILE.yaml` and `--json-flag.key value`. Differences here: an
    error raises ConfigError instead of printing the usage, flags cannot be abbreviated, and help is always complete.

    `explain_unknown`: from the words that no flag takes and from all known flags to the error's text.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser, SortedHelpFormatter

    class HelpFormatter(SortedHelpFormatter):  # type: ignore[misc]  # vLLM is not type-checked here
        def _get_help_string(self, action: argparse.Action) -> str | None:
            # "(default: None)" tells nothing; a switch is off by default. Not `in`: 0 is shown, and 0 == False.
            if action.default is None or action.default is False or action.default == "":
                return (action.help or "").removesuffix(" (default: %(default)s)")
            text: str | None = super()._get_help_string(action)
            if text is not None and isinstance(action.default, tuple):  # words, as the flag takes them
                text = text.replace("%(default)s", " ".join(action.default).replace("%", "%%"))
            return text

    class OmniArgumentParser(FlexibleArgumentParser):  # type: ignore[misc]  # as above
        def error(self, message: str) -> NoReturn:
            # argparse writes "argument --flag: takes ..."; drop the first word
            raise ConfigError(re.sub(r"^argument (\S+): ", r"\1 ", to_one_line(message)))

        def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
            known, unknown = super().parse_known_args(args, namespace)
            if unknown:
                raise ConfigError(explain_unknown(unknown, self._option_string_actions))
            return known, unknown

        def _get_option_tuples(self, option_string: str) -> list[Any]:
            return []  # otherwise argparse takes -t for -tp: `allow_abbrev` covers flags with two dashes only

        def format_help(self) -> str:
            return argparse.ArgumentParser.format_help(self)

    common: Any = {"description": description, "allow_abbrev": False, "formatter_class": HelpFormatter}
    top = OmniArgumentParser(prog=prog, **common)
    commands = top.add_subparsers(required=True, metavar="serve", dest="command", parser_class=OmniArgumentParser)
    serve = commands.add_parser("serve", help=description, usage=f"{serve_line(prog)} [flags]", **common)
    return top, serve


def serve_line(prog: str) -> str:
    """Command line that serves a model: with `--omni` if the program is vLLM's."""
    return f"{prog} serve MODEL --omni" if prog == "vllm" else f"{prog} serve MODEL"


def vllm_version() -> str:
    from vllm.version import __version__

    return str(__version__)


def swagger_ui_folder() -> Path | None:
    """Folder of Swagger UI's script and style sheet in vLLM's package; None if it is missing."""
    package = find_spec("vllm")  # does not import it
    if package is None or package.origin is None:
        return None
    folder = Path(package.origin).parent / "entrypoints" / "serve" / "instrumentator" / "static"
    return folder if folder.is_dir() else None


def configured_api_key() -> str | None:
    """Key from vLLM's variable VLLM_API_KEY, for a command line without `--api-key`."""
    import vllm.envs as envs

    key: str | None = envs.VLLM_API_KEY
    return key


LORA_UPDATES_VARIABLE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


def allows_lora_updates() -> bool:
    """Whether vLLM's variable allows clients to load and unload adapters, for a command line without our flag."""
    import vllm.envs as envs

    return bool(envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING)


def log_config(quiet_paths: list[str], level: str) -> dict[str, Any]:
    """vLLM's `log_config` for uvicorn, without access lines for `quiet_paths`, plus times and our loggers.

    The level of our loggers is VLLM_LOGGING_LEVEL. Raises ConfigError for an unknown level.
    """
    from vllm.logging_utils import create_uvicorn_log_config

    config: dict[str, Any] = create_uvicorn_log_config(excluded_paths=quiet_paths, log_level=level)
    for formatter in config["formatters"].values():
        formatter["fmt"] = "%(asctime)s " + formatter["fmt"]
    for name in LOGGERS:
        config["loggers"][name] = {"handlers": ["default"], "level": logging_level(), "propagate": False}
    return config


def start_certificate_refresher(config: uvicorn.Config) -> Any:
    """Start to reload changed certificate files into the TLS context of `config`; returns an object with `stop()`."""
    from vllm.entrypoints.launchers.utils.ssl import SSLCertRefresher

    return SSLCertRefresher(
        ssl_context=config.ssl, key_path=config.ssl_keyfile, cert_path=config.ssl_certfile, ca_path=config.ssl_ca_certs
    )


class ApiKeyMiddleware:
    """vLLM's AuthenticationMiddleware, which protects `/v1`, with OpenAI's error object in its response.

    It protects `paths`, too.

    vLLM's response is `{"error": "Unauthorized"}`, which the OpenAI SDK does not show to users. Routes never respond
    401, so every 401 comes from the middleware.
    """

    def __init__(self, app: ASGIApp, tokens: list[str], paths: Collection[str] = ()) -> None:
        from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

        self._guarded = AuthenticationMiddleware(app, tokens)
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = False
        if self._is_refused(scope):
            await JSONResponse(_INVALID_KEY, 401, _INVALID_KEY_HEADERS)(scope, receive, send)
            return

        async def send_error_object(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] == 401:
                refused = True
                await JSONResponse(_INVALID_KEY, 401, _INVALID_KEY_HEADERS)(scope, receive, send)
            elif not refused:
                await send(message)

        await self._guarded(scope, receive, send_error_object)

    def _is_refused(self, scope: Scope) -> bool:
        """Whether the request is for one of `paths` and has no key. Like vLLM, preflight requests need none."""
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            return False
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return path in self._paths and not self._guarded.verify_token(Headers(scope=scope))


_INVALID_KEY = {
    "error": {
        "message": "Incorrect or missing API key; send it as 'Authorization: Bearer KEY'.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
}
_INVALID_KEY_HEADERS = {"WWW-Authenticate": "Bearer", "x-should-retry": "false"}
