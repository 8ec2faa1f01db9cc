"""Rewrite requirements/cpu.txt with the newest versions that pyproject.toml's extras `cpu` and `dev` allow.

.venv/bin/python tools/lock.py      (installs nothing)
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

LOCK = Path(__file__).parent.parent / "requirements" / "cpu.txt"
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec", "vllm-omni")


def main() -> None:
    comments = [line for line in LOCK.read_text().splitlines() if line.startswith("#")]
    with tempfile.NamedTemporaryFile("r", suffix=".json") as report:
        command = ["-m", "pip", "install", "--dry-run", "--ignore-installed", "--report", report.name, ".[cpu,dev]"]
        subprocess.run([sys.executable, *command], cwd=LOCK.parent.parent, check=True)
        items = json.load(report)["install"]
    versions = {re.sub(r"[-_.]+", "-", i["metadata"]["name"]).lower(): i["metadata"]["version"] for i in items}
    # CUDA's libraries belong to the CUDA build of torch, which requires them itself.
    pins = [f"{n}=={v}" for n, v in versions.items() if n not in LEFT_OUT and not n.startswith(("nvidia-", "cuda-"))]
    LOCK.write_text("\n".join([*comments, *sorted(pins)]) + "\n")
    print(f"{LOCK}: {len(pins)} packages")


if __name__ == "__main__":
    main()
