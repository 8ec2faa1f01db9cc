"""The command with broken model folders: one line on stderr and exit code 2, before a worker loads."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.broken_folders import Breakage, both, cut, sharded, values
from tests.entrypoints.cli.server_process import VLLM

STEM = "diffusion_pytorch_model"
SHARD = f"transformer/{STEM}-00002-of-00002.safetensors"
BROKEN: dict[str, tuple[Breakage, str]] = {
    "shard": (both(sharded("transformer", STEM), cut(SHARD, -1)), f"{SHARD} is truncated: it has "),
    "layers": (
        values("transformer/config.json", num_layers=10**9),
        "transformer/config.json: num_layers takes a whole number from 1 to 10000, got 1000000000",
    ),
}


@pytest.mark.thorough
def test_each_ends_the_command_with_one_line(tiny_model: Path, tmp_path: Path) -> None:
    # All at once: nearly all of the time goes into imports, and waits for the machine's other work.
    ended: dict[str, subprocess.Popen[str]] = {}
    try:
        for name, (breakage, _) in BROKEN.items():
            folder = shutil.copytree(tiny_model, tmp_path / name)
            breakage(folder)
            ended[name] = subprocess.Popen(
                [VLLM, "serve", str(folder), "--omni", "--port", "0"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        for name, (_, words) in BROKEN.items():
            output, errors = ended[name].communicate()
            assert ended[name].returncode == 2
            assert output == ""
            (line,) = errors.splitlines()
            assert line.startswith(f"vllm-omni: error: {words}")
    finally:
        for process in ended.values():
            process.kill()
            process.wait()
