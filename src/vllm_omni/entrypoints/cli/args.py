"""Flags of the command line: type, help, and default, which is read from the dataclass that owns the setting.

`parse_args` turns `serve MODEL ...` into checked, frozen settings, or raises ConfigError with one line that names the
flag, the value that it got and the values that it takes. Server flags have vLLM's names and meaning.
"""

from __future__ import annotations

import argparse
import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

import yaml

from vllm_omni import __version__
from vllm_omni.diffusion.data import ALIASES, STEP_CACHES, DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.entrypoints.cli import adapter_flags, flag_types
from vllm_omni.entrypoints.cli.commands import (
    CALIBRATE,
    PLAN,
    add_foreign_flags,
    check_command,
    check_foreign_flags,
    explain_unknown,
)
from vllm_omni.entrypoints.cli.commands import DEST as FOREIGN_DEST
from vllm_omni.entrypoints.openai.settings import EVERY, HttpOptions, ServerSettings
from vllm_omni.entrypoints.vllm_api import LORA_UPDATES_VARIABLE, make_parser, serve_line, vllm_version
from vllm_omni.errors import ConfigError, NotAvailableError
from vllm_omni.foreign.diffusion_server_flags import SGLANG_FLAGS, VLLM_OMNI_FLAGS
from vllm_omni.foreign.vllm_flags import VLLM_FLAGS
from vllm_omni.inputs.field_values import field_types
from vllm_omni.video_jobs.settings import VideoJobSettings

T = TypeVar("T")

DESCRIPTION = (
    "Serve a diffusion model with OpenAI-compatible APIs of images and videos. 'none: ...' says what holds without the "
    "flag."
)
EXAMPLES = """examples:
  {serve} --port 8091
  {serve} --revision main --dtype bfloat16 --max-num-seqs 8 --api-key KEY
  {serve} --cfg-parallel-size 2 --usp 2 --cache-backend cache_dit --cache-config.enable_taylorseer true

docs/flags.md lists the flags of vLLM and other servers, and which of them are accepted."""
MAX_DEFAULT_SEED = 2**32 - 1
"""Largest seed, as for seeds that the server draws; the seeds of further pictures then fit 63 bits."""
LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


@dataclass(frozen=True)
class ServeArgs:
    """Settings from one command line."""

    config: OmniDiffusionConfig
    settings: ServerSettings
    http: HttpOptions = field(default_factory=HttpOptions)
    videos: VideoJobSettings = field(default_factory=VideoJobSettings)
    ignored_flags: tuple[str, ...] = ()
    """Given flags of other servers that have no effect here."""


# Server flags whose feature is not available: the parser knows them, and any value is refused.
UNAVAILABLE = {
    "allowed_local_media_path": "folder of media files that requests may name",
    "otlp_traces_endpoint": "OpenTelemetry collector for traces",
}


def parse_args(argv: Sequence[str], prog: str = "vllm") -> ServeArgs:
    """Parse `["serve", MODEL, ...]`. Raises ConfigError; `--help` and `--version` raise SystemExit(0).

    `prog`: name under which the program was started.
    """
    # Without `--omni`: when vLLM's parser reads a config file, it expects the model directly after `serve`.
    words = [word for word in argv if word != "--omni"]
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    check_command(words, serve_line(prog))
    _check_config_file(words)
    _check_dotted_words(words)
    parser = build_parser(prog)
    try:
        namespace = parser.parse_args(words)
    except ValueError as error:  # raised by vLLM's parser; ConfigError is a ValueError too
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
    return _settings(namespace, serve_line(prog))


def build_parser(prog: str = "vllm") -> argparse.ArgumentParser:
    """Parser with all flags; public for the test that freezes the list."""
    own: set[str] = set()
    help_command = serve_line(prog).replace(" MODEL", "") + " --help"
    top, serve = make_parser(prog, DESCRIPTION, partial(explain_unknown, own=own, help_command=help_command))
    serve.epilog = EXAMPLES.format(serve=serve_line(prog).replace("MODEL", "Qwen/Qwen-Image"))
    top.epilog = (
        f"vllm-omni {CALIBRATE} MODEL measures the polynomial for --cache-backend tea_cache; vllm-omni {PLAN} MODEL "
        "prints the memory that a server needs."
    )
    top.add_argument("-v", "--version", action="version", version=f"vllm-omni {__version__}, vLLM {vllm_version()}")
    serve.add_argument("model_tag", nargs="?", metavar="MODEL", help="a folder, a hub name, `demo` or `demo-video`")
    serve.add_argument("--model", type=flag_types.nonempty, help="the same as MODEL, for config files")
    serve.add_argument("--omni", action="store_true", help="serve a diffusion model (without it: vLLM's own server)")
    serve.add_argument("--config", metavar="FILE.yaml", help="read flags from a YAML file; the command line wins")
    _add_server_flags(serve.add_argument_group("server, as in vLLM"))
    _add_http_flags(serve.add_argument_group("connections, as in vLLM"))
    _add_parallel_flags(serve.add_argument_group("parallelism"))
    _add_cache_and_memory_flags(serve.add_argument_group("step caches and memory"))
    _add_adapter_flags(serve.add_argument_group("LoRA adapters"))
    _add_scheduling_flags(serve.add_argument_group("scheduling and limits"))
    _add_video_flags(serve.add_argument_group("jobs of videos, for models that make them"))
    _add_loading_flags(serve.add_argument_group("loading"))
    _add_compute_flags(serve.add_argument_group("compute"))
    own.update(flag for action in serve._actions for flag in action.option_strings)
    add_foreign_flags(serve, (*VLLM_FLAGS, *VLLM_OMNI_FLAGS, *SGLANG_FLAGS))
    return top


class FlagGroup:
    """Adds flags to a group; the fields of the dataclass `owner` have their defaults and the types of their values.

    Keywords of argparse replace those that follow from the field's type.
    """

    def __init__(self, group: Any, owner: type) -> None:
        self._group = group
        self._fields = {f.name: f for f in fields(owner)}
        self._types = field_types(owner)

    def add(self, name: str, help: str, *flags: str, **kwargs: Any) -> None:
        f = self._fields[name]
        default = f.default if f.default_factory is MISSING else f.default_factory()
        kwargs = kwargs or _keywords_for(name, self._types[name])
        if kwargs.get("action") is argparse.BooleanOptionalAction:
            assert default is False, "a config file cannot switch off what is on by default"
        default = None if default in (MISSING, (), {}) else default
        self._group.add_argument(*(flags or [_dashed(name)]), dest=name, help=help, default=default, **kwargs)


def _keywords_for(name: str, kind: Any) -> dict[str, Any]:
    """argparse's keywords for the flag of a field of the type `kind`."""
    origin = get_origin(kind)
    if origin in (UnionType, Union):
        return _keywords_for(name, next(part for part in get_args(kind) if part is not NoneType))
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is Literal:
        return {"choices": (*get_args(kind), *ALIASES.get(name, ()))}
    if origin is tuple:
        return {"nargs": "+", "type": flag_types.nonempty}
    types = {int: flag_types.integer(1), float: flag_types.seconds(zero=False), Mapping: flag_types.json_object}
    return {"type": types.get(origin or kind, flag_types.nonempty)}


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_server_flags(group: Any) -> None:
    http, settings = FlagGroup(group, HttpOptions), FlagGroup(group, ServerSettings)
    http.add("host", "address to listen on; none: all addresses of this machine")
    http.add("port", "TCP port; 0: a free port", type=flag_types.integer(0, 65535))
    http.add("uds", "Unix socket to listen on instead of host and port")
    names_help = "model names that requests may use; responses report the first; none: MODEL"
    settings.add("served_model_names", names_help, "--served-model-name")
    settings.add("root_path", "path prefix of this server behind a proxy, such as /omni", type=flag_types.root_path)
    settings.add("media_ttl_seconds", "seconds for which the url of a picture works", "--media-ttl")
    settings.add("default_response_format", "response_format of requests that give none; url: a link to this server")
    tasks_help = "text tasks of chat front ends (titles, tags): answer with empty text, or with a picture"
    settings.add("chat_text_tasks", tasks_help)
    domains_help = (
        "exact names of hosts from which pictures are fetched that requests give by URL; none: only data: URLs"
    )
    settings.add("allowed_media_domains", domains_help, nargs="+", type=flag_types.host_name)
    timeout_help = "seconds that running requests have after SIGTERM; 0: abort them at once"
    http.add("shutdown_timeout", timeout_help, type=flag_types.seconds(zero=True))
    middleware_help = "import paths of ASGI middlewares; repeatable"
    http.add("middleware", middleware_help, nargs="+", action="extend", type=flag_types.import_path)
    http.add("uvicorn_log_level", "log level of the HTTP server", choices=LOG_LEVELS)
    http.add("disable_uvicorn_access_log", "no log line for each HTTP request")
    quiet_paths_help = "paths whose requests are not logged, such as /health,/metrics"
    http.add("disable_access_log_for_endpoints", quiet_paths_help, nargs="+", type=flag_types.comma_list)
    request_ids_help = "without effect: every response has an x-request-id, the request's own or a new one"
    group.add_argument("--enable-request-id-headers", action=argparse.BooleanOptionalAction, help=request_ids_help)
    settings.add("disable_docs", "no /docs and /openapi.json", "--disable-fastapi-docs")
    keep_alive_help = "seconds without an event after which a stream sends a comment, so that proxies keep it open"
    settings.add("keep_alive_seconds", keep_alive_help, "--sse-keep-alive-interval")
    settings.add("log_prompts", "write prompts to the log")
    settings.add("log_requests", "write a log line for each request that arrives", "--enable-log-requests")
    off_help = "older name of --no-enable-log-requests, the default"
    settings.add("log_requests", off_help, "--disable-log-requests", action="store_false")
    for name, help in UNAVAILABLE.items():
        group.add_argument(_dashed(name), dest=name, nargs="+", help=f"{help} (not available yet)")


def _add_http_flags(group: Any) -> None:
    http = FlagGroup(group, HttpOptions)
    http.add("api_key", "keys for /v1; none: that of VLLM_API_KEY, or no key needed", nargs="+", type=flag_types.secret)
    http.add("allowed_origins", "CORS: origins that browsers may call from", nargs="+", type=flag_types.strings)
    http.add("allowed_methods", "CORS: methods", nargs="+", type=flag_types.strings)
    http.add("allowed_headers", "CORS: request headers", nargs="+", type=flag_types.strings)
    proxies_help = (
        "proxies whose X-Forwarded-Proto and X-Forwarded-For are trusted: addresses, networks, or * for all; none: "
        "FORWARDED_ALLOW_IPS, or 127.0.0.1 and ::1"
    )
    http.add("forwarded_allow_ips", proxies_help, nargs="+", type=flag_types.proxies)
    http.add("allow_credentials", "CORS: let browsers send credentials")
    http.add("ssl_keyfile", "TLS key file", type=flag_types.existing_file)
    http.add("ssl_certfile", "TLS certificate file", type=flag_types.existing_file)
    http.add("ssl_ca_certs", "certificates of the authorities for client certificates", type=flag_types.existing_file)
    http.add("ssl_cert_reqs", "client certificates: 0 none, 1 optional, 2 required", type=int, choices=(0, 1, 2))
    http.add("ssl_ciphers", "OpenSSL cipher list (TLS 1.2 and below)")
    http.add("enable_ssl_refresh", "reload the certificate when its files change")


def _add_parallel_flags(group: Any) -> None:
    parallel = FlagGroup(group, DiffusionParallelConfig)
    ulysses_help = "devices that share a sequence; in attention each computes some of the heads"
    parallel.add("ulysses_degree", ulysses_help, "--usp", "--ulysses-degree")
    ring_help = "devices that share a sequence; in attention keys and values go around a ring"
    parallel.add("ring_degree", ring_help, "--ring", "--ring-degree")
    parallel.add("cfg_parallel_size", "devices that share the guidance branches")
    parallel.add("tensor_parallel_size", "devices that share each weight", "--tensor-parallel-size", "-tp")
    parallel.add("data_parallel_size", "copies of the model", "--data-parallel-size", "-dp")
    parallel.add("vae_patch_parallel_size", "devices that share one VAE decode")
    parallel.add("text_encoder_tp_size", "devices that share the text encoder")


def _add_cache_and_memory_flags(group: Any) -> None:
    engine = FlagGroup(group, OmniDiffusionConfig)
    engine.add("cache_backend", "cache that skips blocks between steps", choices=("none", *STEP_CACHES))
    engine.add("cache_config", "the cache's settings as JSON")
    engine.add("gpu_memory_utilization", "share of a GPU's memory that the server may take", type=flag_types.share)
    offload_help = "keep text encoder, transformer and VAE in host memory; each comes to the device in its turn"
    engine.add("enable_cpu_offload", offload_help)
    layerwise_help = "keep blocks in host memory; each is copied to the device while the one before it computes"
    engine.add("enable_layerwise_offload", layerwise_help)
    sharding_help = "with --usp or --ring: each device keeps a part of each block; blocks are gathered as they run"
    engine.add("weight_sharding", sharding_help)
    resident_help = (
        "with --enable-layerwise-offload: blocks of the transformer that stay on the device; none or auto: as many as "
        "its memory has room for"
    )
    engine.add("resident_layers", resident_help, type=flag_types.integer_or_auto(0))
    sleep_help = "let clients put the server to sleep and wake it, by /sleep and /wake_up"
    engine.add("enable_sleep_mode", sleep_help)
    engine.add("vae_use_slicing", "decode one picture at a time")
    engine.add("vae_use_tiling", "decode a picture in overlapping tiles")
    engine.add("overlap_decode", "on a GPU: decode in parallel with the next step of other requests")


def _add_adapter_flags(group: Any) -> None:
    engine = FlagGroup(group, OmniDiffusionConfig)
    modules_help = (
        "adapters that requests may name, as NAME=PATH or as JSON: name, path, and defaults, which are sampling "
        "parameters for requests that name the adapter"
    )
    engine.add("lora_modules", modules_help, nargs="+", action="extend", type=adapter_flags.lora_modules)
    dirs_help = "folders whose adapters requests may name by their file names, and which are read when first named"
    engine.add("lora_dirs", dirs_help, "--lora-dir", nargs="+", action="extend", type=flag_types.nonempty)
    loading_help = (
        "let clients load adapters from the folders of --lora-dir, and unload them, by /v1/load_lora_adapter and "
        f"/v1/unload_lora_adapter; none: as the variable {LORA_UPDATES_VARIABLE} says"
    )
    group.add_argument("--enable-lora-loading", action=argparse.BooleanOptionalAction, help=loading_help)
    engine.add(
        "max_loras", "most adapters on the device; none: 8, and more while they take less than 1/20 of its free memory"
    )
    engine.add(
        "max_cpu_loras", "most adapters in the host's memory, at least --max-loras; none: 32, or twice --max-loras"
    )


def _add_scheduling_flags(group: Any) -> None:
    engine = FlagGroup(group, OmniDiffusionConfig)
    engine.add("max_num_seqs", "most requests that advance in one step")
    engine.add("max_batch_tokens", "most tokens of one step, over all branches; none: measured at start")
    engine.add("scheduling_policy", "fair: least remaining work first, with ageing; fcfs: first come, first served")
    engine.add("max_num_queued_reqs", "most pictures queued or running; further ones get status 429")
    engine.add("max_queue_seconds", "most seconds of work queued or running; more gets status 429")
    pixels_help = "most pixels of a picture; none: four times the model's default size, at least 1024x1024"
    engine.add("max_pixels", pixels_help)
    engine.add("max_inference_steps", "most denoising steps of a request")
    engine.add("max_num_frames", "most frames of a video; none: the model's default number")
    engine.add("max_worker_restarts", "restarts of dead workers within ten minutes", type=flag_types.integer(0))
    engine.add("default_sampling_params", "defaults for requests, as JSON")
    seed_help = (
        "seed of requests that give none (picture i of a request has seed + i): the same request then gives the same "
        "picture; none: a random seed for each request"
    )
    group.add_argument("--seed", type=flag_types.integer(0, MAX_DEFAULT_SEED), help=seed_help)


_JOB_TTL_FLAG = "--job-ttl"


def changed_video_flags(videos: VideoJobSettings) -> list[str]:
    """Flags of video jobs whose values are not the defaults."""
    names = [f.name for f in fields(videos) if getattr(videos, f.name) != f.default]
    return [_JOB_TTL_FLAG if name == "job_ttl_seconds" else _dashed(name) for name in names]


def _add_video_flags(group: Any) -> None:
    jobs = FlagGroup(group, VideoJobSettings)
    store_help = (
        "database of the jobs, shared by all servers that name it: a path, sqlite:////PATH or "
        "postgresql://USER@HOST/NAME; "
        "none: an SQLite file in $XDG_STATE_HOME/vllm-omni, by default ~/.local/state/vllm-omni"
    )
    jobs.add("job_store", store_help)
    media_help = (
        "files of the jobs: a folder or s3://BUCKET/PREFIX, shared by the same servers; none: a folder beside the "
        "SQLite file"
    )
    jobs.add("media_store", media_help)
    jobs.add("job_ttl_seconds", "seconds for which an ended job and its video are kept", _JOB_TTL_FLAG)
    keys_help = "most unfinished jobs of one API key, without keys of all clients; further ones get status 429"
    jobs.add("max_jobs_per_key", keys_help)
    jobs.add("max_jobs", "most jobs that are kept, ended ones included; further ones get status 507")
    checkpoint_help = "seconds of a job's work after which its state is stored, from which any server can go on"
    jobs.add("checkpoint_seconds", checkpoint_help)


def add_hub_flags(engine: FlagGroup) -> None:
    """Flags of a model on the hub."""
    engine.add("revision", "branch, tag or commit of a hub model; none: main")
    engine.add("variant", "variant of the weight files, such as fp16; none: the files without variant")
    engine.add("download_dir", "folder for downloads; none: the hub's cache (HF_HOME)")
    token_help = (
        "token for private and gated hub models; without a value: the token of `hf auth login`; none: the variable "
        "HF_TOKEN (not visible in the list of processes), or the token of `hf auth login`"
    )
    engine.add("hf_token", token_help, nargs="?", const=True)


def add_dtype_flag(engine: FlagGroup) -> None:
    dtype_help = (
        "type of weights and activations; auto: bfloat16 on CUDA, float32 on CPU; half: float16; float: float32"
    )
    engine.add("dtype", dtype_help)


def _add_loading_flags(group: Any) -> None:
    engine = FlagGroup(group, OmniDiffusionConfig)
    add_hub_flags(engine)
    load_format_help = "auto, safetensors: read safetensors files; dummy: random weights, no weight file is read"
    engine.add("load_format", load_format_help)
    file_help = "safetensors or GGUF file with the transformer's weights, in place of those of MODEL; none: MODEL's"
    engine.add("transformer_file", file_help)
    second_help = "the same for the second transformer (Wan 2.2: the one for low noise); none: MODEL's"
    engine.add("transformer_file_2", second_help)


def _add_compute_flags(group: Any) -> None:
    engine = FlagGroup(group, OmniDiffusionConfig)
    engine.add("device", "device of the model; auto: CUDA if there is one, else the CPU")
    add_dtype_flag(engine)
    quantization_help = "type of the matrix products in the transformer's blocks; none: that of --dtype"
    engine.add("quantization", quantization_help, "--quantization", "-q")
    encoder_help = "type in which the text encoder's weights are kept; none: that of --dtype"
    engine.add("text_encoder_quantization", encoder_help)
    engine.add("attention_backend", "attention kernel; none: the fastest one, measured at start")
    eager_help = "on a GPU: neither compile the transformer's blocks nor capture small steps as CUDA graphs"
    engine.add("enforce_eager", eager_help)
    kernels_help = (
        "implementation of the transformer's fused elementwise operations and norms, and of the norms in Z-Image's "
        "VAE; auto: triton on CUDA, torch on a CPU"
    )
    engine.add("kernels", kernels_help)
    engine.add("distributed_executor_backend", "mp: worker processes; uni: in this process")


def _settings(namespace: argparse.Namespace, serve_line: str) -> ServeArgs:
    given = vars(namespace)
    ignored_flags = check_foreign_flags(given[FOREIGN_DEST])
    for name in UNAVAILABLE:
        if given[name] is not None:
            raise NotAvailableError(f"{_dashed(name)} {' '.join(given[name])}: not available yet")
    model = namespace.model_tag or namespace.model
    if not model:
        raise ConfigError(f"MODEL is missing: {serve_line}, with a folder, a hub name, 'demo' or 'demo-video'")
    if bool(namespace.ssl_keyfile) != bool(namespace.ssl_certfile):
        raise ConfigError("--ssl-keyfile and --ssl-certfile need each other, got only one of them")
    _check_companions(given)
    given["served_model_names"] = given["served_model_names"] or [model]
    lists = ("allowed_origins", "allowed_methods", "allowed_headers", "disable_access_log_for_endpoints")
    for name in (*lists, "forwarded_allow_ips"):
        if given[name] is not None:
            given[name] = [item for part in given[name] for item in ([part] if isinstance(part, str) else part)]
    given["model"] = model
    given.update(adapter_flags.adapter_settings(given, given["served_model_names"]))
    given["default_sampling_params"] = _with_seed(given["default_sampling_params"] or {}, given["seed"])
    parallel = make_settings(DiffusionParallelConfig, given)
    return ServeArgs(
        config=make_settings(OmniDiffusionConfig, {**given, "parallel": parallel}),
        settings=make_settings(ServerSettings, given),
        http=make_settings(HttpOptions, given),
        videos=make_settings(VideoJobSettings, given),
        ignored_flags=ignored_flags,
    )


def _check_companions(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for a flag that needs another one to have an effect.

    Otherwise a server could start without the protection that its command line asks for.
    """
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
    """Default sampling parameters with the value of `--seed`. Raises ConfigError for another seed in them."""
    if seed is None:
        return defaults
    if (other := defaults.get("seed")) not in (None, seed):
        raise ConfigError(f"--seed {seed} and --default-sampling-params with the seed {other}: give one of them")
    return {**defaults, "seed": seed}


def make_settings(cls: type[T], given: Mapping[str, Any]) -> T:
    """Instance of the dataclass `cls` from the parsed values of its fields; None leaves the field's default."""
    own = {f.name: given[f.name] for f in fields(cast(Any, cls)) if given.get(f.name) is not None}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in own.items()})


def _check_config_file(words: Sequence[str]) -> None:
    """Raise ConfigError for a config file on which vLLM's parser would fail without a clear message."""
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
    """Raise ConfigError for negative decimals, which vLLM's parser takes for `--json-flag.key`."""
    for previous, word, following in zip(["", *words], words, [*words[1:], None]):
        needs_value = word == "--model" or _is_dotted(word)
        if needs_value and following is None:
            raise ConfigError(f"{word} expected one argument")
        if re.match(r"-\d*\.\d", word) and not _is_dotted(previous):
            raise ConfigError(f"{previous} takes no negative number, got {word!r}")


def _is_dotted(word: str) -> bool:
    """Whether the word is `--json-flag.key`, whose value is the next word."""
    return bool(re.match(r"--?[a-zA-Z][^=]*\.", word)) and "=" not in word
