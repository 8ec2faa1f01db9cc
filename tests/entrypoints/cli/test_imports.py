"""Packages that commands must not import, because each costs seconds at every start."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest


def modules_after(statement: str) -> set[str]:
    """Names of the modules loaded in a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        # vLLM loads the plugin in every process of every server.
        ("from vllm_omni.entrypoints import plugin; plugin.register()", {"torch", "vllm", "fastapi", "yaml"}),
        # Servers of models that make pictures need no database.
        ("import vllm_omni.video_jobs.records, vllm_omni.video_jobs.store", {"torch", "sqlalchemy", "fastapi"}),
        ("import vllm_omni.entrypoints.openai.app", {"sqlalchemy", "av"}),
        # Parsing needs vLLM's parser, and no engine and no HTTP app.
        ("import vllm_omni.entrypoints.cli.main", {"torch", "vllm", "fastapi", "uvicorn", "transformers"}),
    ],
)
def test_light_modules_import_nothing_heavy(statement: str, forbidden: set[str]) -> None:
    assert modules_after(statement) & forbidden == set()


def test_parsing_imports_neither_engine_nor_server() -> None:
    """Nor vLLM's language-model engine, which would double the time to `--help`."""
    loaded = modules_after(
        "import sys\nfrom vllm_omni.entrypoints.cli.main import main\n"
        "sys.stdout = sys.stderr\ntry: main(['serve', '--omni', '--help'])\nexcept SystemExit: pass\n"
        "sys.stdout = sys.__stdout__"
    )
    heavy = {"fastapi", "uvicorn", "diffusers", "vllm.engine.arg_utils", "vllm.config", "vllm_omni.omni"}
    assert "vllm.utils.argparse_utils" in loaded
    assert loaded & heavy == set()


def test_vllm_finds_the_plugin_and_the_command_exists() -> None:
    (plugin,) = entry_points(group="vllm.general_plugins", name="omni")
    assert plugin.load()() is None
    (command,) = entry_points(group="console_scripts", name="vllm-omni")
    assert command.value == "vllm_omni.entrypoints.cli.main:main"
