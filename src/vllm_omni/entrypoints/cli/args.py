"""The command line: every flag, its type, its default (read from the dataclass that owns it) and its help.

`parse_args` turns `serve MODEL ...` into checked, frozen settings, or raises ConfigError with one line that names the
flag, what it got and what it takes. Server flags carry the names and the meaning that vLLM gives them.
"""

from __future__ import annotations

import argparse
import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

import yaml

from vllm_omni import __version__
from vllm_omni.diffusion.data import (
    ALIASES,
    STEP_CACHES,
    AttentionBackendName,
    DeviceChoice,
    DiffusionParallelConfig,
    DType,
    ExecutorBackend,
    KernelsName,
    LoadFormat,
    OmniDiffusionConfig,
    Quantization,
    SchedulingPolicy,
)
from vllm_omni.entrypoints.cli import calibrate, values
from vllm_omni.entrypoints.cli.commands import check_command
from vllm_omni.entrypoints.cli.foreign_flags import DEST as FOREIGN_DEST
from vllm_omni.entrypoints.cli.foreign_flags import add_foreign_flags, check_foreign_flags
from vllm_omni.entrypoints.cli.suggestions import explain_unknown
from vllm_omni.entrypoints.cli.vllm_surface import make_parser, serve_line, vllm_version
from vllm_omni.entrypoints.openai.settings import ChatTextTasks, ResponseFormat, ServerSettings
from vllm_omni.errors import ConfigError, NotAvailableError
from vllm_omni.foreign.diffusion_server_flags import SGLANG_FLAGS, VLLM_OMNI_FLAGS
from vllm_omni.foreign.vllm_flags import VLLM_FLAGS

DESCRIPTION = "Serve a diffusion model with an OpenAI-compatible image API."
EXAMPLES = """examples:
  {serve} --port 8091
  {serve} --revision main --dtype bfloat16 --max-num-seqs 8 --api-key KEY
  {serve} --cfg-parallel-size 2 --usp 2 --cache-backend cache_dit --cache-config.enable_taylorseer true

docs/flags.md says what becomes of flags of vLLM and other servers."""
MAX_DEFAULT_SEED = 2**32 - 1
"""Seeds that the server draws are of this range too; the seeds of further pictures stay within 63 bits."""
EVERY = "*"
"""CORS: any origin, method or header."""
LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


@dataclass(frozen=True)
class HttpOptions:
    """How the server listens, who may talk to it, and what it logs."""

    host: str | None = None
    port: int = 8000
    uds: str | None = None
    api_key: tuple[str, ...] = ()
    allow_credentials: bool = False
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = (EVERY,)
    allowed_headers: tuple[str, ...] = (EVERY,)
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = int(ssl.CERT_NONE)
    ssl_ciphers: str | None = None
    enable_ssl_refresh: bool = False
    forwarded_allow_ips: tuple[str, ...] = ()
    """Proxies whose X-Forwarded-Proto and -For are believed; none: FORWARDED_ALLOW_IPS, or 127.0.0.1 and ::1."""
    middleware: tuple[str, ...] = ()
    uvicorn_log_level: str = "info"
    disable_uvicorn_access_log: bool = False
    disable_access_log_for_endpoints: tuple[str, ...] = ()
    shutdown_timeout: float = 25.0
    """Seconds that running requests have after SIGTERM; fits the 30 s that Kubernetes grants by default."""


@dataclass(frozen=True)
class ServeArgs:
    """One parsed command line."""

    config: OmniDiffusionConfig
    settings: ServerSettings
    http: HttpOptions = field(default_factory=HttpOptions)
    ignored_flags: tuple[str, ...] = ()
    """Flags of other servers that were given and have no effect here."""


# Server flags whose feature is not built: they parse, and any value is refused.
UNAVAILABLE = {
    "allowed_local_media_path": "folder from which requests may read media files",
    "otlp_traces_endpoint": "OpenTelemetry collector that gets traces",
    "job_store": "SQLAlchemy URL of the video jobs",
    "media_store": "fsspec URL of the finished videos",
}


def parse_args(argv: Sequence[str], prog: str = "vllm") -> ServeArgs:
    """Settings from `["serve", MODEL, ...]`. Raises ConfigError; `--help` and `--version` raise SystemExit(0).

    `prog`: the name that the program was started under.
    """
    # vLLM looks for the model right behind `serve` when it reads a config file; `--omni` has done its work.
    words = [word for word in argv if word != "--omni"]
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    check_command(words, serve_line(prog))
    _check_config_file(words)
    _check_dotted_words(words)
    parser = build_parser(prog)
    try:
        namespace = parser.parse_args(words)
    except ValueError as error:  # vLLM's own checks; ConfigError is a ValueError too
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
    return _settings(namespace, serve_line(prog))


def build_parser(prog: str = "vllm") -> argparse.ArgumentParser:
    """The parser with all flags (public for the test that freezes the list)."""
    own: set[str] = set()
    help_command = serve_line(prog).replace(" MODEL", "") + " --help"
    top, serve = make_parser(prog, DESCRIPTION, partial(explain_unknown, own=own, help_command=help_command))
    serve.epilog = EXAMPLES.format(serve=serve_line(prog).replace("MODEL", "Qwen/Qwen-Image"))
    top.epilog = f"vllm-omni {calibrate.COMMAND} MODEL measures the polynomial of --cache-backend tea_cache."
    top.add_argument("-v", "--version", action="version", version=f"vllm-omni {__version__}, vLLM {vllm_version()}")
    serve.add_argument("model_tag", nargs="?", metavar="MODEL", help="a folder, a hub name, or `demo`")
    serve.add_argument("--model", type=values.nonempty, help="MODEL, for config files")
    serve.add_argument("--omni", action="store_true", help="serve a diffusion model (without it: vLLM's own server)")
    serve.add_argument("--config", metavar="FILE.yaml", help="read flags from a YAML file; the command line wins")
    _add_server_flags(serve.add_argument_group("server, as in vLLM"))
    _add_http_flags(serve.add_argument_group("connections, as in vLLM"))
    _add_parallel_flags(serve.add_argument_group("parallelism"))
    _add_cache_and_memory_flags(serve.add_argument_group("step caches and memory"))
    _add_scheduling_flags(serve.add_argument_group("scheduling and limits"))
    _add_loading_flags(serve.add_argument_group("loading"))
    _add_compute_flags(serve.add_argument_group("compute"))
    own.update(flag for action in serve._actions for flag in action.option_strings)
    add_foreign_flags(serve, (*VLLM_FLAGS, *VLLM_OMNI_FLAGS, *SGLANG_FLAGS))
    return top


class _Flags:
    """Adds flags to a group: `--field-name` unless spelled otherwise, with the default of the dataclass `owner`."""

    def __init__(self, group: Any, owner: type) -> None:
        self._group = group
        self._defaults = {
            f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(owner)
        }

    def add(self, name: str, help: str, *flags: str, **kwargs: Any) -> None:
        default = self._defaults[name]
        kwargs.setdefault("default", None if default in ((), {}) else default)
        self._group.add_argument(*(flags or [_dashed(name)]), dest=name, help=help, **kwargs)

    def switch(self, name: str, help: str, *flags: str) -> None:
        assert self._defaults[name] is False, "a config file cannot switch off what is on by default"
        self.add(name, help, *flags, action=argparse.BooleanOptionalAction)


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_server_flags(group: Any) -> None:
    http, settings = _Flags(group, HttpOptions), _Flags(group, ServerSettings)
    http.add("host", "address to listen on; none: all of this machine's", type=values.nonempty)
    http.add("port", "TCP port; 0: a free one", type=values.integer(0, 65535))
    http.add("uds", "Unix socket to listen on instead of host and port", type=values.nonempty)
    names_help = "names that requests may use; the first is reported; none: MODEL"
    settings.add("served_model_names", names_help, "--served-model-name", default=None, nargs="+", type=values.nonempty)
    settings.add("root_path", "path prefix under which a proxy serves us, such as /omni", type=values.root_path)
    settings.add(
        "media_ttl_seconds",
        "seconds that a picture can be fetched by its url",
        "--media-ttl",
        type=values.seconds(zero=False),
    )
    format_help = "form of pictures where a request has no response_format; url: a link to this server"
    settings.add("default_response_format", format_help, choices=get_args(ResponseFormat))
    tasks_help = "text tasks of chat front ends (titles, tags): answer with empty text, or generate a picture"
    settings.add("chat_text_tasks", tasks_help, choices=get_args(ChatTextTasks))
    settings.add(
        "allowed_media_domains",
        "hosts, by their exact names, from which pictures are fetched that requests name by URL; none: only data: URLs",
        nargs="+",
        type=values.host_name,
    )
    http.add(
        "shutdown_timeout",
        "seconds that running requests have after SIGTERM; 0: they are aborted",
        type=values.seconds(zero=True),
    )
    middleware_help = "import paths of middlewares; repeatable"
    http.add("middleware", middleware_help, nargs="+", action="extend", type=values.import_path)
    http.add("uvicorn_log_level", "log level of the HTTP server", choices=LOG_LEVELS)
    http.switch("disable_uvicorn_access_log", "no log line for each HTTP request")
    http.add(
        "disable_access_log_for_endpoints",
        "paths whose requests are not logged, such as /health,/metrics",
        nargs="+",
        type=values.comma_list,
    )
    request_ids_help = "accepted: every answer has an x-request-id, the request's own or a new one"
    group.add_argument("--enable-request-id-headers", action=argparse.BooleanOptionalAction, help=request_ids_help)
    settings.switch("disable_docs", "no /docs and /openapi.json", "--disable-fastapi-docs")
    settings.add(
        "keep_alive_seconds",
        "silence after which an event stream sends a comment, so that proxies keep it open",
        "--sse-keep-alive-interval",
        type=values.seconds(zero=False),
    )
    settings.switch("log_prompts", "write prompts to the log")
    settings.switch("log_requests", "one log line for each request that arrives", "--enable-log-requests")
    off_help = "the default; an older name of --no-enable-log-requests"
    settings.add("log_requests", off_help, "--disable-log-requests", action="store_false")
    for name, help in UNAVAILABLE.items():
        group.add_argument(_dashed(name), dest=name, nargs="+", help=f"{help} (not available yet)")


def _add_http_flags(group: Any) -> None:
    http = _Flags(group, HttpOptions)
    http.add("api_key", "keys that open /v1; none: VLLM_API_KEY, or no key needed", nargs="+", type=values.secret)
    http.add("allowed_origins", "CORS: origins that browsers may call from", nargs="+", type=values.strings)
    http.add("allowed_methods", "CORS: methods", nargs="+", type=values.strings)
    http.add("allowed_headers", "CORS: request headers", nargs="+", type=values.strings)
    http.add(
        "forwarded_allow_ips",
        "proxies whose X-Forwarded-Proto and X-Forwarded-For are believed: addresses, networks, or * for all; none: "
        "FORWARDED_ALLOW_IPS, or 127.0.0.1 and ::1",
        nargs="+",
        type=values.proxies,
    )
    http.switch("allow_credentials", "CORS: let browsers send credentials")
    http.add("ssl_keyfile", "TLS key file", type=values.existing_file)
    http.add("ssl_certfile", "TLS certificate file", type=values.existing_file)
    http.add("ssl_ca_certs", "file of the authorities that sign client certificates", type=values.existing_file)
    http.add("ssl_cert_reqs", "client certificates: 0 none, 1 optional, 2 required", type=int, choices=(0, 1, 2))
    http.add("ssl_ciphers", "OpenSSL cipher list (TLS 1.2 and below)", type=values.nonempty)
    http.switch("enable_ssl_refresh", "reload the certificate when its files change")


def _add_parallel_flags(group: Any) -> None:
    parallel = _Flags(group, DiffusionParallelConfig)
    degree = values.integer(1)
    parallel.add("ulysses_degree", "devices that share a sequence by heads", "--usp", "--ulysses-degree", type=degree)
    parallel.add("ring_degree", "devices that share a sequence by a ring", "--ring", "--ring-degree", type=degree)
    parallel.add("cfg_parallel_size", "devices that share the guidance branches", type=degree)
    parallel.add("tensor_parallel_size", "devices that share each layer", "--tensor-parallel-size", "-tp", type=degree)
    parallel.add("data_parallel_size", "copies of the model", "--data-parallel-size", "-dp", type=degree)
    parallel.add("vae_patch_parallel_size", "devices that share one decode", type=degree)
    parallel.add("text_encoder_tp_size", "devices that share the text encoder", type=degree)


def _add_cache_and_memory_flags(group: Any) -> None:
    engine = _Flags(group, OmniDiffusionConfig)
    engine.add("cache_backend", "cache that skips blocks between steps", choices=("none", *STEP_CACHES))
    engine.add("cache_config", "the cache's settings as JSON", type=values.json_object)
    engine.switch("enable_cpu_offload", "keep idle models in the host's memory")
    engine.switch("enable_layerwise_offload", "bring transformer layers in one by one")
    engine.add("lora_modules", "LoRA adapters to serve, as NAME=PATH", nargs="+", action="extend", type=values.adapter)
    engine.switch("vae_use_slicing", "decode one picture at a time")
    engine.switch("vae_use_tiling", "decode a picture in overlapping tiles")
    engine.switch("overlap_decode", "on a GPU, decode beside the next step of others")


def _add_scheduling_flags(group: Any) -> None:
    engine = _Flags(group, OmniDiffusionConfig)
    count = values.integer(1)
    engine.add("max_num_seqs", "most requests that advance in one step", type=count)
    engine.add("max_batch_tokens", "most tokens of one step; none: measured at start", type=count)
    engine.add("scheduling_policy", "fair: least work left first, with ageing", choices=get_args(SchedulingPolicy))
    engine.add("max_num_queued_reqs", "most pictures waiting or running; more are answered 429", type=count)
    engine.add(
        "max_queue_seconds", "most work waiting or running; more is answered 429", type=values.seconds(zero=False)
    )
    engine.add(
        "max_pixels", "most pixels of a picture; none: four times the model's own size, or 1024x1024", type=count
    )
    engine.add("max_inference_steps", "most denoising steps of a request", type=count)
    engine.add("max_num_frames", "most frames of a video", type=count)
    engine.add("max_worker_restarts", "restarts of dead workers within ten minutes", type=values.integer(0))
    engine.add("default_sampling_params", "defaults for requests, as JSON", type=values.json_object)
    group.add_argument(
        "--seed",
        type=values.integer(0, MAX_DEFAULT_SEED),
        help="seed of requests that bring none (picture i of a request has seed + i), so that the same request gives "
        "the same picture; none: drawn for each request",
    )


def _add_loading_flags(group: Any) -> None:
    engine = _Flags(group, OmniDiffusionConfig)
    engine.add("revision", "branch, tag or commit of a hub model; none: main", type=values.nonempty)
    engine.add("variant", "set of weight files to load, such as fp16; none: those without one", type=values.nonempty)
    engine.add("download_dir", "folder for downloads; none: the hub's cache (HF_HOME)", type=values.nonempty)
    engine.add(
        "hf_token",
        "token for private and gated hub models; without a value: that of `hf auth login`; none: the variable "
        "HF_TOKEN, which the list of processes does not show, or that of `hf auth login`",
        nargs="?",
        const=True,
    )
    engine.add(
        "load_format",
        "auto, safetensors: safetensors files; dummy: random weights, no weight file is read",
        choices=(*get_args(LoadFormat), *ALIASES["load_format"]),
    )


def _add_compute_flags(group: Any) -> None:
    engine = _Flags(group, OmniDiffusionConfig)
    engine.add("device", "where the model runs; auto: CUDA where there is any", choices=get_args(DeviceChoice))
    engine.add(
        "dtype",
        "type of the weights; auto: bfloat16 on CUDA, float32 on CPU; half: float16; float: float32",
        choices=(*get_args(DType), *ALIASES["dtype"]),
    )
    quantization_help = "type of the weights in the transformer's blocks; none: as --dtype"
    engine.add("quantization", quantization_help, "--quantization", "-q", choices=get_args(Quantization))
    engine.add(
        "attention_backend", "attention kernel; none: the fastest that runs", choices=get_args(AttentionBackendName)
    )
    engine.switch(
        "enforce_eager", "on a GPU: neither compile the transformer's blocks nor send small steps as CUDA graphs"
    )
    engine.add(
        "kernels",
        "of what lies between the products in the transformer's blocks, and of norms in Z-Image's VAE; auto: triton on "
        "CUDA, torch on a CPU",
        choices=get_args(KernelsName),
    )
    engine.add("distributed_executor_backend", "where workers live", choices=get_args(ExecutorBackend))


def _settings(namespace: argparse.Namespace, serve_line: str) -> ServeArgs:
    given = vars(namespace)
    ignored_flags = check_foreign_flags(given[FOREIGN_DEST])
    for name in UNAVAILABLE:
        if given[name] is not None:
            raise NotAvailableError(f"{_dashed(name)} {' '.join(given[name])}: not available yet")
    model = namespace.model_tag or namespace.model
    if not model:
        raise ConfigError(f"MODEL is missing: {serve_line}, with a folder, a hub name or 'demo'")
    if bool(namespace.ssl_keyfile) != bool(namespace.ssl_certfile):
        raise ConfigError("--ssl-keyfile and --ssl-certfile need each other, got only one of them")
    _check_companions(given)
    given["served_model_names"] = given["served_model_names"] or [model]
    lists = ("allowed_origins", "allowed_methods", "allowed_headers", "disable_access_log_for_endpoints")
    for name in (*lists, "forwarded_allow_ips"):
        if given[name] is not None:
            given[name] = [item for part in given[name] for item in ([part] if isinstance(part, str) else part)]
    given["model"] = model
    given["lora_modules"] = _adapters(given["lora_modules"] or [], given["served_model_names"])
    given["default_sampling_params"] = _with_seed(given["default_sampling_params"] or {}, given["seed"])
    parallel = _make(DiffusionParallelConfig, given)
    return ServeArgs(
        config=_make(OmniDiffusionConfig, {**given, "parallel": parallel}),
        settings=_make(ServerSettings, given),
        http=_make(HttpOptions, given),
        ignored_flags=ignored_flags,
    )


def _check_companions(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for flags that change nothing without another one: a server that was meant to be protected must
    not start without protection."""
    if not given["ssl_certfile"]:
        for name in ("enable_ssl_refresh", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers"):
            if given[name]:
                raise ConfigError(f"{_dashed(name)} needs --ssl-keyfile and --ssl-certfile")
    if given["ssl_cert_reqs"] != ssl.CERT_NONE and not given["ssl_ca_certs"]:
        raise ConfigError(f"--ssl-cert-reqs {given['ssl_cert_reqs']} needs --ssl-ca-certs, which sign the certificates")
    if not given["allowed_origins"]:
        for name in ("allow_credentials", "allowed_methods", "allowed_headers"):
            if given[name] not in (getattr(HttpOptions, name), [EVERY]):
                raise ConfigError(f"{_dashed(name)} needs --allowed-origins: without it no other origin may call")


def _with_seed(defaults: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """The default sampling parameters with that of `--seed`."""
    if seed is None:
        return defaults
    if (other := defaults.get("seed")) not in (None, seed):
        raise ConfigError(f"--seed {seed} and --default-sampling-params with the seed {other}: give one of them")
    return {**defaults, "seed": seed}


def _adapters(pairs: Sequence[tuple[str, str]], model_names: Sequence[str]) -> dict[str, str]:
    names = [*model_names, *(name for name, _ in pairs)]
    if twice := [name for name, _ in pairs if names.count(name) > 1]:
        raise ConfigError(f"--lora-modules takes a name once, and none of the model's, got {twice[0]!r}")
    return dict(pairs)


def _make(cls: type[Any], given: dict[str, Any]) -> Any:
    """`cls` from those of the parsed values that are its fields; None leaves the field's own default."""
    own = {f.name: given[f.name] for f in fields(cls) if given.get(f.name) is not None}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in own.items()})


def _check_config_file(words: Sequence[str]) -> None:
    """Refuse a config file that vLLM's parser would stumble over."""
    places = [i for i, word in enumerate(words) if word == "--config"]
    if not places:
        return
    if len(places) > 1 or places[0] + 1 == len(words):
        raise ConfigError("--config takes one YAML file")
    path = Path(words[places[0] + 1])
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config takes a readable YAML file, got {str(path)!r}: {reason}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config takes a YAML file of `flag: value` lines, got {str(path)!r} without any")
    for name, value in content.items():
        if not isinstance(name, str) or value is None:
            got = f"{name!r} without a value" if value is None else f"{name!r}"
            raise ConfigError(f"--config takes `flag: value` lines, got {got} in {str(path)!r}")
        if "." in name and isinstance(value, bool | list):
            flag, _, key = name.partition(".")
            raise ConfigError(f"--config takes `{flag}: {{{key}: ...}}`, got {name!r} in {str(path)!r}")
        for item in value if isinstance(value, list) else [value]:
            if re.match(r"-.*\.", str(item)):
                raise ConfigError(f"--{name} takes no negative number and no other flag, got {item!r} in {str(path)!r}")


def _check_dotted_words(words: Sequence[str]) -> None:
    """Refuse what vLLM's parser would stumble over: it takes words with a dash and a dot for `--json-flag.key`."""
    for previous, word, following in zip(["", *words], words, [*words[1:], None]):
        needs_value = word == "--model" or _is_dotted(word)
        if needs_value and following is None:
            raise ConfigError(f"{word} expected one argument")
        if re.match(r"-\d*\.\d", word) and not _is_dotted(previous):
            raise ConfigError(f"{previous} takes no negative number, got {word!r}")


def _is_dotted(word: str) -> bool:
    """Whether the word is `--json-flag.key`, whose value is the next word."""
    return bool(re.match(r"--?[a-zA-Z][^=]*\.", word)) and "=" not in word
