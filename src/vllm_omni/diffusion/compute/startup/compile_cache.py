"""Where compiled code outlives the process that compiled it."""

from __future__ import annotations

import os
from pathlib import Path

FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "omni_torch_compile", "TRITON_CACHE_DIR": "omni_triton"}
"""Environment variables that PyTorch and Triton read when they compile (there is no other way to tell them for all that
they keep), and the folders that these name by default."""


def keep_compiled_code() -> None:
    """Let this process keep compiled code in vLLM's cache folder; folders that are named already stay."""
    # vLLM's own rule for its cache folder, so that both keep their code in one place.
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("VLLM_CACHE_ROOT") or Path(user_cache, "vllm"))
    for variable, folder in FOLDERS.items():
        os.environ.setdefault(variable, str(root.expanduser() / folder))
