"""Folders that keep compiled code for later processes."""

from __future__ import annotations

import os
from pathlib import Path

FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "omni_torch_compile", "TRITON_CACHE_DIR": "omni_triton"}
"""Environment variable -> default name of the folder. PyTorch and Triton read these variables when they compile; no
other setting covers all files that they keep."""


def keep_compiled_code() -> None:
    """Make this process keep compiled code in vLLM's cache folder. Variables that are set already do not change."""
    # vLLM's rule for its cache folder, so that both keep their code in one place.
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("VLLM_CACHE_ROOT") or Path(user_cache, "vllm"))
    for variable, folder in FOLDERS.items():
        os.environ.setdefault(variable, str(root.expanduser() / folder))
