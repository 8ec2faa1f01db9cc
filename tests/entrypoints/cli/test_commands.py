"""The first word of the command line, and the name that the program was started under."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from tests.fake_packages import install_mismatched_torchvision
from vllm_omni.entrypoints.cli.commands import OTHER_COMMANDS, program_name
from vllm_omni.entrypoints.cli.main import main


def vllm_commands() -> set[str]:
    """The names of vLLM's commands, from the modules that its `main` imports."""
    spec = importlib.util.find_spec("vllm.entrypoints.cli.main")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    main_source = (folder / "main.py").read_text()
    modules = re.findall(r"^    import vllm\.entrypoints\.cli\.([\w.]+)$", main_source, re.MULTILINE)
    names = set()
    for module in modules:
        tree = ast.parse((folder / f"{module.replace('.', '/')}.py").read_text())
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        commands = [node for node in classes if any(ast.unparse(base) == "CLISubcommand" for base in node.bases)]
        names |= {
            ast.literal_eval(line.value)
            for node in commands
            for line in node.body
            if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "name"
        }
    return names


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_every_command_of_vllm_says_what_to_do_instead() -> None:
    assert vllm_commands() == {"serve", *OTHER_COMMANDS}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["bench", "serve", "--omni", "--model", "x"],
            r"bench is not for image servers: .*python -m benchmarks\.serving",
        ),
        (["--omni", "bench", "throughput"], r"bench is not for image servers: "),
        (["chat", "--omni", "--url", "http://x"], r"chat is not .*POST /v1/images/generations"),
        (["complete", "--omni"], r"complete is not .*POST /v1/images/generations"),
        (["run-batch", "--omni", "-i", "x"], r"run-batch is not .*POST /v1/images/generations"),
        (["collect-env", "--omni"], r"collect-env is not .*: run it without --omni: vllm collect-env"),
        (["--omni"], r"a command is missing: vllm serve MODEL --omni"),
        (["--omni", "--port", "1", "serve"], r"a command is missing: vllm serve MODEL --omni"),
        (["srve", "demo", "--omni"], r"'srve' is no command: did you mean serve\?"),
        (["paint", "--omni"], r"'paint' is no command: the command is vllm serve MODEL --omni"),
    ],
)
def test_another_command_ends_the_program_with_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.match(f"vllm-omni: error: {message}", error_of(words, capsys))


@pytest.mark.parametrize(
    ("argv0", "name"),
    [
        ("vllm", "vllm"),
        ("/usr/bin/vllm", "vllm"),
        ("/site-packages/vllm/entrypoints/cli/main.py", "vllm"),
        ("/usr/bin/vllm-omni", "vllm-omni"),
        ("/site-packages/vllm_omni/entrypoints/cli/main.py", "vllm-omni"),
    ],
)
def test_the_program_has_the_name_that_it_was_started_under(argv0: str, name: str) -> None:
    assert program_name(argv0) == name


def test_errors_of_vllm_omni_say_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vllm-omni"])
    expected = r"vllm-omni: error: MODEL is missing: vllm-omni serve MODEL, with"
    assert error_of(["serve"], capsys).startswith(expected)
    assert "(`vllm-omni serve --help` lists" in error_of(["serve", "demo", "--unknown"], capsys)
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: vllm-omni serve MODEL [flags]")
    assert "  vllm-omni serve Qwen/Qwen-Image --port 8091\n" in text


def test_a_package_that_does_not_match_torch_ends_the_command_before_anything_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = install_mismatched_torchvision(tmp_path, monkeypatch)
    assert error_of(["serve", "demo"], capsys).startswith(f"vllm-omni: error: {message}")
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
