"""Every flag: what it parses to, what it refuses and how. Nothing here reads weights."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_omni.diffusion.catalog.find_folder import EMBEDDED_MODELS
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.entrypoints.cli import args as cli
from vllm_omni.entrypoints.cli.commands import DEST as FOREIGN_DEST
from vllm_omni.entrypoints.cli.main import main
from vllm_omni.entrypoints.openai.settings import HttpOptions, ServerSettings
from vllm_omni.errors import ConfigError, NotAvailableError
from vllm_omni.video_jobs.settings import VideoJobSettings

# The outside contract: change it knowingly. `--no-x` forms of switches are left out.
FROZEN_FLAGS = [
    "--allow-credentials",
    "--allowed-headers",
    "--allowed-local-media-path",
    "--allowed-media-domains",
    "--allowed-methods",
    "--allowed-origins",
    "--api-key",
    "--attention-backend",
    "--cache-backend",
    "--cache-config",
    "--cfg-parallel-size",
    "--chat-text-tasks",
    "--checkpoint-seconds",
    "--config",
    "--data-parallel-size",
    "--default-response-format",
    "--default-sampling-params",
    "--device",
    "--disable-access-log-for-endpoints",
    "--disable-fastapi-docs",
    "--disable-log-requests",
    "--disable-uvicorn-access-log",
    "--distributed-executor-backend",
    "--download-dir",
    "--dtype",
    "--enable-cpu-offload",
    "--enable-layerwise-offload",
    "--enable-log-requests",
    "--enable-lora-loading",
    "--enable-request-id-headers",
    "--enable-sleep-mode",
    "--enable-ssl-refresh",
    "--enforce-eager",
    "--forwarded-allow-ips",
    "--gpu-memory-utilization",
    "--help",
    "--hf-token",
    "--host",
    "--job-store",
    "--job-ttl",
    "--kernels",
    "--load-format",
    "--log-prompts",
    "--lora-dir",
    "--lora-modules",
    "--max-batch-tokens",
    "--max-cpu-loras",
    "--max-inference-steps",
    "--max-jobs",
    "--max-jobs-per-key",
    "--max-loras",
    "--max-num-frames",
    "--max-num-queued-reqs",
    "--max-num-seqs",
    "--max-pixels",
    "--max-queue-seconds",
    "--max-worker-restarts",
    "--media-store",
    "--media-ttl",
    "--middleware",
    "--model",
    "--omni",
    "--otlp-traces-endpoint",
    "--overlap-decode",
    "--port",
    "--quantization",
    "--resident-layers",
    "--revision",
    "--ring",
    "--ring-degree",
    "--root-path",
    "--scheduling-policy",
    "--seed",
    "--served-model-name",
    "--shutdown-timeout",
    "--sse-keep-alive-interval",
    "--ssl-ca-certs",
    "--ssl-cert-reqs",
    "--ssl-certfile",
    "--ssl-ciphers",
    "--ssl-keyfile",
    "--tensor-parallel-size",
    "--text-encoder-quantization",
    "--text-encoder-tp-size",
    "--transformer-file",
    "--transformer-file-2",
    "--uds",
    "--ulysses-degree",
    "--usp",
    "--uvicorn-log-level",
    "--vae-patch-parallel-size",
    "--vae-use-slicing",
    "--vae-use-tiling",
    "--variant",
    "--weight-sharding",
    "-dp",
    "-h",
    "-q",
    "-tp",
]

# Names of ours that are not vLLM's, or whose default differs on purpose.
NOT_VLLM_HTTP_FLAGS = {"shutdown_timeout", "forwarded_allow_ips"}


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line that should have been refused must not start one."""
    monkeypatch.setitem(sys.modules, "vllm_omni.entrypoints.cli.serve", SimpleNamespace(serve=lambda args: 99))


def parse(*words: str) -> cli.ServeArgs:
    return cli.parse_args(["serve", "demo", "--omni", *words])


def serve_parser() -> argparse.ArgumentParser:
    commands = [action.choices for action in cli.build_parser()._actions if isinstance(action.choices, dict)]
    (serve,) = (parsers["serve"] for parsers in commands)
    assert isinstance(serve, argparse.ArgumentParser)
    return serve


def test_the_list_of_flags_is_frozen() -> None:
    actions = [action for action in serve_parser()._actions if action.dest != FOREIGN_DEST]
    flags = {flag for action in actions for flag in action.option_strings}
    assert sorted(flag for flag in flags if not flag.startswith("--no-")) == sorted(FROZEN_FLAGS)


def test_defaults_are_the_dataclasses_own() -> None:
    assert parse() == cli.ServeArgs(
        config=OmniDiffusionConfig(model="demo"), settings=ServerSettings(served_model_names=("demo",))
    )


def test_every_engine_setting_has_a_flag() -> None:
    dests = {action.dest for action in serve_parser()._actions}
    wanted = {f.name for cls in (OmniDiffusionConfig, DiffusionParallelConfig, HttpOptions) for f in fields(cls)}
    # One has a flag for each field, one comes with --lora-modules, one is for scripts.
    assert wanted - dests == {"parallel", "lora_defaults", "progress_bar"}


def test_http_flags_have_vllms_names_and_defaults() -> None:
    spec = importlib.util.find_spec("vllm.entrypoints.launchers.cli_args")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    theirs = {
        ast.unparse(statement.target): ast.unparse(statement.value)
        for statement in classes["FrontendArgs"].body
        if isinstance(statement, ast.AnnAssign) and statement.value is not None
    }
    for f in fields(HttpOptions):
        if f.name in NOT_VLLM_HTTP_FLAGS:
            continue
        default = theirs[f.name]
        if default in ("None", "True", "False") or default.startswith("'") or default.isdigit():
            empty_or_equal = f.default == ast.literal_eval(default) or (default == "None" and f.default == ())
            assert empty_or_equal, (f.name, default, f.default)


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--max-num-seqs", "4"], "max_num_seqs", 4),
        (["--max_num_seqs=4"], "max_num_seqs", 4),
        (["--max-batch-tokens", "2048"], "max_batch_tokens", 2048),
        (["--max-num-queued-reqs", "7"], "max_num_queued_reqs", 7),
        (["--max-queue-seconds", "1.5"], "max_queue_seconds", 1.5),
        (["--max-pixels", "65536"], "max_pixels", 65536),
        (["--max-inference-steps", "9"], "max_inference_steps", 9),
        (["--max-worker-restarts", "0"], "max_worker_restarts", 0),
        (["--scheduling-policy", "fcfs"], "scheduling_policy", "fcfs"),
        (["--quantization", "fp8"], "quantization", "fp8"),
        (["--distributed-executor-backend", "uni"], "distributed_executor_backend", "uni"),
        (["--device", "cpu"], "device", "cpu"),
        (["--attention-backend", "torch_varlen"], "attention_backend", "torch_varlen"),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--dtype", "half"], "dtype", "float16"),
        (["--dtype", "float"], "dtype", "float32"),
        (["--load-format", "safetensors"], "load_format", "auto"),
        (["--revision", "v1.0"], "revision", "v1.0"),
        (["--download-dir", "/models"], "download_dir", "/models"),
        (["--hf-token", "hf_x"], "hf_token", "hf_x"),
        (["--hf-token"], "hf_token", True),
        (["--seed", "7"], "default_sampling_params", {"seed": 7}),
        (["--seed", "7", "--default-sampling-params.fps", "8"], "default_sampling_params", {"fps": 8, "seed": 7}),
        (["--seed", "7", "--default-sampling-params", '{"seed": 7}'], "default_sampling_params", {"seed": 7}),
        (["-q", "fp8"], "quantization", "fp8"),
        (["--overlap-decode"], "overlap_decode", True),
        (["--enforce-eager"], "enforce_eager", True),
        (["--load-format", "dummy"], "load_format", "dummy"),
        (["--vae-use-slicing"], "vae_use_slicing", True),
        (["--vae_use_tiling"], "vae_use_tiling", True),
        (["--default-sampling-params", '{"seed": 3}'], "default_sampling_params", {"seed": 3}),
        (["--default-sampling-params.num_inference_steps", "8"], "default_sampling_params", {"num_inference_steps": 8}),
    ],
)
def test_engine_flags(words: list[str], field: str, value: object) -> None:
    assert getattr(parse(*words).config, field) == value


def test_parallel_flags() -> None:
    parsed = parse(
        *("--usp", "2", "--ring", "3", "--cfg-parallel-size", "2", "-tp", "1", "-dp", "2"),
        *("--vae-patch-parallel-size", "6", "--text-encoder-tp-size", "4"),
    )
    assert parsed.config.parallel == DiffusionParallelConfig(2, 3, 2, 1, 2, 6, 4)
    parsed = parse("--ulysses-degree", "2", "--ring-degree", "3", "--tensor-parallel-size", "4")
    assert parsed.config.parallel == DiffusionParallelConfig(2, 3, tensor_parallel_size=4)
    assert parse("--data-parallel-size", "5").config.parallel == DiffusionParallelConfig(data_parallel_size=5)


def test_server_flags(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    key.touch()
    certificate.touch()
    parsed = parse(
        *("--host", "::1", "--port", "0", "--api-key", "one", "two", "--allowed-origins", '["https://a", "https://b"]'),
        *("--allowed-methods", "GET", "POST", "--allow-credentials", "--root-path", "/omni/", "--media-ttl", "60"),
        *("--served-model-name", "gpt-image-1", "demo", "--middleware", "a.B", "--middleware", "c.d.E"),
        *("--uvicorn-log-level", "warning", "--disable-access-log-for-endpoints", "/health, /metrics"),
        *("--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), "--enable-ssl-refresh"),
        *("--shutdown-timeout", "3", "--disable-fastapi-docs", "--enable-request-id-headers", "--log-prompts"),
        *("--allowed-media-domains", "images.example", "10.1.2.3", "CDN.example"),
        *("--enable-log-requests", "--sse-keep-alive-interval", "5"),
        *("--default-response-format", "url", "--chat-text-tasks", "generate"),
        *("--forwarded-allow-ips", "10.0.0.0/8, ::1", "192.0.2.7"),
    )
    assert parsed.http == HttpOptions(
        host="::1",
        port=0,
        api_key=("one", "two"),
        allowed_origins=("https://a", "https://b"),
        allowed_methods=("GET", "POST"),
        allow_credentials=True,
        forwarded_allow_ips=("10.0.0.0/8", "::1", "192.0.2.7"),
        middleware=("a.B", "c.d.E"),
        uvicorn_log_level="warning",
        disable_access_log_for_endpoints=("/health", "/metrics"),
        ssl_keyfile=str(key),
        ssl_certfile=str(certificate),
        enable_ssl_refresh=True,
        shutdown_timeout=3.0,
    )
    assert parsed.settings == ServerSettings(
        served_model_names=("gpt-image-1", "demo"),
        root_path="/omni",
        media_ttl_seconds=60.0,
        default_response_format="url",
        chat_text_tasks="generate",
        allowed_media_domains=("images.example", "10.1.2.3", "cdn.example"),
        disable_docs=True,
        log_prompts=True,
        log_requests=True,
        keep_alive_seconds=5.0,
    )


def test_flags_of_video_jobs() -> None:
    parsed = parse(
        *("--job-store", "postgresql://omni@db/omni", "--media-store", "s3://bucket/videos", "--job-ttl", "60"),
        *("--max-jobs-per-key", "3", "--max-jobs", "9", "--checkpoint-seconds", "2.5"),
    )
    assert parsed.videos == VideoJobSettings(
        job_store="postgresql://omni@db/omni",
        media_store="s3://bucket/videos",
        job_ttl_seconds=60.0,
        max_jobs_per_key=3,
        max_jobs=9,
        checkpoint_seconds=2.5,
    )
    dests = {action.dest for action in serve_parser()._actions}
    without_flag = {"lease_seconds", "poll_seconds", "sweep_seconds", "num_encoding_threads"}
    assert {f.name for f in fields(VideoJobSettings)} - dests == without_flag


def test_omni_and_model_may_stand_anywhere(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("port: 1\n")
    for words in (
        ["serve", "--omni", "demo", "--config", str(config)],
        ["serve", "demo", f"--config={config}", "--omni"],
        ["serve", "demo", "--config", str(config)],
    ):
        parsed = cli.parse_args(words)
        assert (parsed.config.model, parsed.http.port) == ("demo", 1)


def test_a_config_file_gives_what_the_command_line_leaves_open(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "model: demo\nport: 1234\nmax_num_seqs: 3\nenforce-eager: true\nvae-use-tiling: false\n"
        "default-sampling-params:\n  num_inference_steps: 8\nallowed-origins: [https://a, https://b]\n"
        "api-key: [k1, k2]\nmiddleware: [a.B, a.c]\ndisable-access-log-for-endpoints: [/health, /metrics]\n"
    )
    parsed = cli.parse_args(["serve", "--config", str(config), "--port", "99"])
    assert parsed.config == OmniDiffusionConfig(
        model="demo", max_num_seqs=3, enforce_eager=True, default_sampling_params={"num_inference_steps": 8}
    )
    assert parsed.http == HttpOptions(
        port=99,
        allowed_origins=("https://a", "https://b"),
        api_key=("k1", "k2"),
        middleware=("a.B", "a.c"),
        disable_access_log_for_endpoints=("/health", "/metrics"),
    )


WRONG_VALUES = [
    # words, and what the line must hold: the flag, what it got, what it takes
    (["--max-num-seqs", "0"], ["--max-num-seqs", "'0'", "integer of at least 1"]),
    (["--max-num-seqs", "many"], ["--max-num-seqs", "'many'", "integer of at least 1"]),
    (["--max-batch-tokens", "-5"], ["--max-batch-tokens", "'-5'", "integer of at least 1"]),
    (["--max-num-queued-reqs", "1.5"], ["--max-num-queued-reqs", "'1.5'", "integer"]),
    (["--max-queue-seconds", "nan"], ["--max-queue-seconds", "'nan'", "seconds above 0"]),
    (["--max-queue-seconds", "inf"], ["--max-queue-seconds", "'inf'", "a finite number of seconds above 0"]),
    (["--shutdown-timeout", "inf"], ["--shutdown-timeout", "'inf'", "a finite number of seconds, 0 or more"]),
    (["--max-pixels", "9" * 20], ["--max-pixels takes an integer of up to 63 bits, got 99999999999999999999"]),
    (["--max-queue-seconds", "0"], ["--max-queue-seconds", "'0'", "seconds above 0"]),
    (["--max-pixels", "x"], ["--max-pixels", "'x'", "integer"]),
    (["--max-inference-steps", "0"], ["--max-inference-steps", "'0'", "integer"]),
    (["--max-num-frames", "0"], ["--max-num-frames", "'0'", "integer"]),
    (["--max-worker-restarts", "-1"], ["--max-worker-restarts", "'-1'", "integer of at least 0"]),
    (["--port", "70000"], ["--port", "'70000'", "0 to 65535"]),
    (["--port"], ["--port", "expected one argument"]),
    (["--shutdown-timeout", "soon"], ["--shutdown-timeout", "'soon'", "seconds"]),
    (["--default-response-format", "png"], ["--default-response-format", "'png'", "b64_json", "url"]),
    (["--chat-text-tasks", "off"], ["--chat-text-tasks", "'off'", "empty", "generate"]),
    (["--media-ttl", "0"], ["--media-ttl", "'0'", "seconds above 0"]),
    (["--job-ttl", "0"], ["--job-ttl", "'0'", "seconds above 0"]),
    (["--checkpoint-seconds", "-1"], ["--checkpoint-seconds", "'-1'", "seconds above 0"]),
    (["--max-jobs", "0"], ["--max-jobs", "'0'", "integer of at least 1"]),
    (["--max-jobs-per-key", "many"], ["--max-jobs-per-key", "'many'", "integer of at least 1"]),
    (["--job-store", ""], ["--job-store", "''", "not empty"]),
    (["--job-store", "postgresql://db/omni"], ["--job-store", "--media-store"]),
    *(
        (["--allowed-media-domains", "a.example", wrong], ["--allowed-media-domains", repr(wrong), "exact host name"])
        for wrong in ("https://a.example", "a.example:80", "*.example", "a.example/", ".example", "bücher.example", "")
    ),
    (["--dtype", "float8"], ["--dtype", "'float8'", "bfloat16"]),
    (["--quantization", "int3"], ["--quantization", "'int3'", "fp8"]),
    (["--scheduling-policy", "lifo"], ["--scheduling-policy", "'lifo'", "fcfs"]),
    (["--distributed-executor-backend", "mpi"], ["--distributed-executor-backend", "'mpi'", "uni"]),
    (["--cache-backend", "magic"], ["--cache-backend", "'magic'", "tea_cache"]),
    (["--cache-config", "{bad"], ["--cache-config", "'{bad'", "JSON object"]),
    (
        ["--cache-backend", "tea_cache", "--cache-config", '{"rel_l1_thresh": 0.1, "rel_l1_thresh": 0.3}'],
        ["--cache-config takes each key once, got 'rel_l1_thresh' twice"],
    ),
    (
        ["--cache-backend", "tea_cache", "--cache-config", '{"rel_l1_thresh": Infinity}'],
        ["--cache-config: rel_l1_thresh takes a finite number of at least 0, got inf"],
    ),
    (
        ["--cache-backend", "cache_dit", "--cache-config.taylorseer_order", "2"],
        ["--cache-config: taylorseer_order 2 has no effect without enable_taylorseer"],
    ),
    (["--cache-config", "[1]"], ["--cache-config", "'[1]'", "JSON object"]),
    (["--cache-backend", "tea_cache", "--cache-config", '{"x": 1}'], ["--cache-config", "'x'", "rel_l1_thresh"]),
    (["--cache-config", '{"rel_l1_thresh": 1}'], ["--cache-config", "rel_l1_thresh", "--cache-backend"]),
    (
        ["--cache-backend", "cache_dit", "--cache-config", '{"steps_computation_policy": "lazy"}'],
        ["--cache-config: steps_computation_policy", "'lazy'", "dynamic, static"],
    ),
    (["--default-sampling-params", '{"true_cfg_scale": true}'], ["--default-sampling-params", "a number", "True"]),
    (["--default-sampling-params", "20"], ["--default-sampling-params", "'20'", "JSON object"]),
    (["--default-sampling-params", '{"stepz": 1}'], ["--default-sampling-params", "stepz", "num_inference_steps"]),
    (["--usp", "0"], ["--usp", "'0'", "integer of at least 1"]),
    (["--ring-degree", "two"], ["--ring", "'two'", "integer of at least 1"]),
    (["--usp", "2", "--text-encoder-tp-size", "3"], ["--text-encoder-tp-size", "divide", "ulysses 2", "= 2", "3"]),
    (["-dp", "2", "--distributed-executor-backend", "uni"], ["uni", "one device", "data 2 x", "= 2", "mp"]),
    (["-tp", "x"], ["--tensor-parallel-size", "'x'", "integer of at least 1"]),
    (["--root-path", "omni"], ["--root-path", "'omni'", "begins with /"]),
    (["--api-key", ""], ["--api-key", "empty", "key"]),
    (["--ssl-keyfile", "/nowhere.pem"], ["--ssl-keyfile", "'/nowhere.pem'", "a file that exists"]),
    (["--ssl-keyfile", __file__], ["--ssl-keyfile", "--ssl-certfile"]),
    *(
        (words, [words[0], "needs --ssl-keyfile and --ssl-certfile"])
        for words in (
            *(["--enable-ssl-refresh"], ["--ssl-ca-certs", __file__], ["--ssl-cert-reqs", "2"]),
            ["--ssl-ciphers", "ECDHE+AESGCM"],
        )
    ),
    (
        ["--ssl-keyfile", __file__, "--ssl-certfile", __file__, "--ssl-cert-reqs", "1"],
        ["--ssl-cert-reqs 1 needs --ssl-ca-certs"],
    ),
    *(
        (words, [words[0], "needs --allowed-origins"])
        for words in (["--allow-credentials"], ["--allowed-methods", "GET"], ["--allowed-headers", "x-a"])
    ),
    (["--ssl-cert-reqs", "9"], ["--ssl-cert-reqs", "9", "2"]),
    (["--allowed-origins", "[1]"], ["--allowed-origins", "'[1]'", "strings"]),
    (["--forwarded-allow-ips", "10.0.0.1/8"], ["--forwarded-allow-ips", "'10.0.0.1/8'", "networks such as"]),
    (["--forwarded-allow-ips", "proxy.example"], ["--forwarded-allow-ips", "'proxy.example'", "IP addresses"]),
    (["--middleware", "thing"], ["--middleware", "'thing'", "import path"]),
    (["--uvicorn-log-level", "loud"], ["--uvicorn-log-level", "'loud'", "warning"]),
    (["--served-model-name", " "], ["--served-model-name", "' '", "not empty"]),
    (["--config", "/nowhere.yaml"], ["--config", "/nowhere.yaml", "YAML"]),
    (["--config"], ["--config", "YAML"]),
    (["--max-num", "4"], ["unrecognized --max-num: did you mean --max-num-seqs or", "--help"]),
    (
        ["--chat-temp", "3"],
        ["unrecognized --chat-temp: did you mean --chat-template or --chat-template-content-format?"],
    ),
    (["--max-queue-seconds", "-0.5"], ["--max-queue-seconds", "'-0.5'", "negative"]),
    (["--max-queue-seconds", "-.5", "--port", "1"], ["--max-queue-seconds", "'-.5'", "negative"]),
    (["-t", "2"], ["unrecognized -t "]),
    (["--cache-backnd", "tea_cache"], ["unrecognized --cache-backnd: did you mean --cache-backend?"]),
    (["--max_modl_len=4"], ["unrecognized --max-modl-len: did you mean --max-model-len?"]),
    (["--cache-confg.rel_l1_thresh", "1"], ["unrecognized --cache-confg: did you mean --cache-config?"]),
    (["--prt", "1", "--zzzz"], ["unrecognized --prt: did you mean --port?; unrecognized --zzzz (`"]),
    (["--seed", "1", "2"], ["unrecognized '2'"]),
    (["--cache-config.rel_l1_thresh"], ["--cache-config.rel_l1_thresh", "one argument"]),
    (["--model"], ["--model", "one argument"]),
    (["--seed", "-1"], ["--seed", "'-1'", "0 to 4294967295"]),
    (["--seed", "1", "--default-sampling-params", '{"seed": 2}'], ["--seed 1", "--default-sampling-params", "2"]),
    (["--load-format", "pt"], ["--load-format", "'pt'", "safetensors"]),
    (["--load-format", "gguf"], ["--load-format", "'gguf'", "safetensors"]),
    (["-q", "awq"], ["--quantization", "'awq'", "fp8"]),
    (["--revision", ""], ["--revision", "not empty"]),
    (["--sse-keep-alive-interval", "0"], ["--sse-keep-alive-interval", "'0'", "above 0"]),
]


@pytest.mark.parametrize(("words", "parts"), WRONG_VALUES, ids=lambda value: " ".join(value)[:60])
def test_a_wrong_value_ends_the_program_with_one_line(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "demo", "--omni", *words])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"vllm-omni: error: [^\n]+\n", err)
    assert [part for part in parts if part not in err] == []


@pytest.mark.parametrize("words", [[], ["--port", "1"]])
def test_a_missing_model_is_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--omni", *words])
    assert ended.value.code == 2
    assert "MODEL" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        *("", "- port", "port: [", "surprise: 1", "port: x", "api-key:", "api-key: null", "1: 2"),
        *("pipeline-parallel-size: 2", "max-queue-seconds: -0.5", "cache-config.enable_taylorseer: true"),
        *("cache-config.coefficients: [1, 2]", "middleware: [a.B, -c.D]"),
    ],
)
def test_a_wrong_config_file_is_one_line(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "demo", "--omni", "--config", str(config)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--distributed-executor-backend", "ray"],
        ["--otlp-traces-endpoint", "http://collector:4317"],
        ["--allowed-local-media-path", "/media"],
    ],
    ids=" ".join,
)
def test_what_is_not_built_is_refused_by_name(words: list[str]) -> None:
    with pytest.raises(NotAvailableError, match=f"^{words[0]} .*not available yet"):
        parse(*words)


@pytest.mark.parametrize("words", [[], ["--disable-log-requests"], ["--no-enable-log-requests"]])
def test_requests_are_not_logged_unless_asked_for(words: list[str]) -> None:
    assert parse(*words).settings.log_requests is False


@pytest.mark.parametrize("token", ["hf_\xe9", "hf_a b", ""])
def test_a_wrong_token_is_not_repeated(token: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("--hf-token", token)
    assert str(caught.value) == "--hf-token takes a token of ASCII characters without spaces, got something else"


def test_help_has_examples_and_no_empty_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    helps = set()
    for words in (["serve", "--omni", "--help"], ["serve", "--help", "--omni"], ["serve", "--help=all"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
        helps.add(capsys.readouterr().out)
    (text,) = helps
    one_line = " ".join(text.split())
    assert [word for word in ("default: None", "default: False", "default: )") if word in one_line] == []
    assert [name for name in EMBEDDED_MODELS if f"`{name}`" not in one_line] == []
    assert "devices that share the guidance branches (default: 1)" in one_line
    assert "1 optional, 2 required (default: 0)" in one_line
    assert "CORS: methods (default: *)" in one_line
    _, _, examples = text.partition("examples:\n")
    commands = [line.split() for line in examples.splitlines() if line.startswith("  vllm serve ")]
    assert len(commands) == 3
    for command in commands:
        assert cli.parse_args(command[1:]).config.model == "Qwen/Qwen-Image"
