"""Flags of other servers: each has one place, takes as many values as there, and is ignored where that is right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tools.flags import PAGE, page

from tests.entrypoints.cli.test_args import serve_parser
from vllm_omni.entrypoints.cli import args as cli
from vllm_omni.entrypoints.cli.commands import NARGS
from vllm_omni.errors import ConfigError
from vllm_omni.foreign.diffusion_server_flags import SGLANG_FLAGS, VLLM_OMNI_FLAGS
from vllm_omni.foreign.flags import ForeignFlag, parse_spec
from vllm_omni.foreign.vllm_flags import SAME_HERE, VLLM_FLAGS

ALL_FLAGS = (*VLLM_FLAGS, *VLLM_OMNI_FLAGS, *SGLANG_FLAGS)
LIST_FLAGS = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
flags = {flag: action.nargs for action in parser._actions for flag in action.option_strings}
json.dump(flags, open(sys.argv[1], "w"))
"""


def parse(*words: str) -> cli.ServeArgs:
    return cli.parse_args(["serve", "demo", "--omni", *words])


@pytest.fixture(scope="module")
def vllm_nargs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int | str | None]:
    """Flag -> argparse's `nargs`, from vLLM's own parser. In a process of its own: it imports vLLM's whole engine."""
    file = tmp_path_factory.mktemp("vllm") / "flags.json"
    subprocess.run([sys.executable, "-c", LIST_FLAGS, str(file)], check=True, capture_output=True)
    nargs: dict[str, int | str | None] = json.loads(file.read_text())
    return nargs


@pytest.mark.thorough
def test_every_flag_of_vllm_has_one_place(vllm_nargs: dict[str, int | str | None]) -> None:
    places = Counter([*SAME_HERE, *(name for flag in VLLM_FLAGS for name in flag.option_strings)])
    ours = {flag for action in serve_parser()._actions for flag in action.option_strings}
    aliases_of_ours = {"-h", "-tp", "-dp", "-q"}
    places.update(aliases_of_ours)
    negated = {f"--no-{name[2:]}" for name in SAME_HERE}
    assert sorted(set(vllm_nargs) - set(places) - negated) == []
    assert [name for name, count in places.items() if count > 1] == []
    added = {"-O", *(name for name in places if name.startswith("--no-"))}  # -O: vLLM replaces it before it parses
    assert sorted(set(places) - set(vllm_nargs) - added) == []
    assert sorted((set(SAME_HERE) | aliases_of_ours) - ours) == []


@pytest.mark.thorough
def test_flags_take_as_many_values_as_in_vllm(vllm_nargs: dict[str, int | str | None]) -> None:
    mine = {name: NARGS[flag.arity] for flag in VLLM_FLAGS for name in flag.names if name != "-O"}
    assert mine == {name: vllm_nargs[name] for name in mine}


def test_no_flag_is_in_two_tables() -> None:
    counts = Counter(name for flag in ALL_FLAGS for name in flag.option_strings)
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("flag", ALL_FLAGS, ids=lambda flag: flag.names[0])
def test_a_foreign_flag_is_ignored_or_ends_the_program(flag: ForeignFlag) -> None:
    values = {"switch": [], "one": ["x"], "several": ["x", "y"], "optional": ["x"]}[flag.arity]
    for name in flag.names:
        # The words around it keep their meaning.
        words = [name, *values, "--port", "1"]
        if flag.treatment == "ignored":
            parsed = parse(*words)
            assert (parsed.config.model, parsed.http.port) == ("demo", 1)
            assert parsed.ignored_flags == (name,)
        else:
            with pytest.raises(ConfigError) as caught:
                parse(*words)
            assert str(caught.value).startswith(f"{name}: here " if flag.treatment == "renamed" else name)
            assert flag.text in str(caught.value)
    for value in flag.harmless:
        assert parse(flag.names[0], value).ignored_flags == (flag.names[0],)


@pytest.mark.parametrize(
    ("words", "ignored"),
    [
        (["--max-model-len", "4096"], ["--max-model-len"]),
        (["--max_model_len=4k", "--trust-remote-code"], ["--max-model-len", "--trust-remote-code"]),
        (["-O3"], ["--optimization-level"]),
        (["-O", "3"], ["--optimization-level"]),
        (["-O", '{"mode": 3}'], ["-O"]),
        (["-cc", "{}", "--compilation-config", "{}"], ["-cc", "--compilation-config"]),
        (["--compilation-config.pass_config.fuse", "true"], ["--compilation-config"]),
        (["--max-lora-rank", "2", "--max-lora-rank", "3"], ["--max-lora-rank"]),
        (["--pipeline-parallel-size", "01"], ["--pipeline-parallel-size"]),
        (["--cpu-offload-gb", "0.0"], ["--cpu-offload-gb"]),
        (["--no-enable-prefix-caching"], ["--no-enable-prefix-caching"]),
        (["--cudagraph-capture-sizes", "1", "2", "4"], ["--cudagraph-capture-sizes"]),
    ],
)
def test_what_has_no_effect_is_ignored(words: list[str], ignored: list[str]) -> None:
    parsed = parse(*words)
    assert list(parsed.ignored_flags) == ignored
    assert parsed == cli.ServeArgs(parsed.config, parsed.settings, ignored_flags=tuple(ignored))
    assert parsed.config == parse().config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-num-batched-tokens", "8192"], "--max-num-batched-tokens: here --max-batch-tokens"),
        (
            ["--pipeline-parallel-size", "2", "--num-gpus=4"],
            "--pipeline-parallel-size 2: a model's layers are shared with --tensor-parallel-size, its sequence with "
            "--usp and --ring; this takes 1; --num-gpus: here the product of --usp, --ring, --cfg-parallel-size, "
            "--tensor-parallel-size and --data-parallel-size",
        ),
        (["--headless", "--headless"], "--headless: a server and its workers run on one host"),
        (["--quantization-config.method", "fp8"], "--quantization-config: here --quantization fp8"),
    ],
)
def test_what_would_be_missed_ends_the_program(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*words)
    assert str(caught.value) == message


def test_flags_of_memory_mean_the_same_as_in_vllm() -> None:
    assert parse().config.gpu_memory_utilization == 0.92
    assert parse("--gpu-memory-utilization", "0.9").config.gpu_memory_utilization == 0.9
    assert parse("--gpu-memory-utilization", "1").config.gpu_memory_utilization == 1.0
    assert parse("--enable-sleep-mode").config.enable_sleep_mode
    assert not parse("--no-enable-sleep-mode").config.enable_sleep_mode


@pytest.mark.parametrize("value", ["nan", "x", "0", "1.5", "-0.5", "inf"])
def test_a_wrong_share_of_the_memory_is_refused(value: str) -> None:
    message = f"--gpu-memory-utilization takes a number above 0 and at most 1, got {value!r}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        parse(f"--gpu-memory-utilization={value}")


def test_a_config_file_goes_through_the_same_table(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "max_model_len: 4096\ntrust-remote-code: true\nenable-sleep-mode: true\ngpu-memory-utilization: 0.5\n"
        "pipeline-parallel-size: 1\n"
        "compilation-config: {mode: 3}\ncudagraph-capture-sizes: [1, 2]\nport: 7\n"
    )
    parsed = parse("--config", str(config))
    assert parsed.http.port == 7
    assert (parsed.config.enable_sleep_mode, parsed.config.gpu_memory_utilization) == (True, 0.5)
    assert list(parsed.ignored_flags) == [
        "--max-model-len",
        "--trust-remote-code",
        "--pipeline-parallel-size",
        "--compilation-config",
        "--cudagraph-capture-sizes",
    ]
    config.write_text("device-memory-utilization: 0.5\n")
    with pytest.raises(ConfigError, match=r"^--device-memory-utilization: here --gpu-memory-utilization$"):
        parse("--config", str(config))


def test_the_page_is_the_generated_one() -> None:
    assert PAGE.read_text() == page(), "run python -m tools.flags"


def test_a_spec_says_names_and_number_of_values() -> None:
    assert parse_spec("--headless") == (("--headless",), "switch")
    assert parse_spec("--nnodes/-n=") == (("--nnodes", "-n"), "one")
    assert parse_spec("--params=+") == (("--params",), "several")
    assert parse_spec("--tiling=?") == (("--tiling",), "optional")
