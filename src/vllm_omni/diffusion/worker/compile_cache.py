"""Where compiled code outlives the process that compiled it."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""PyTorch reads it when it compiles; there is no other way to tell it for all that it keeps."""


def keep_compiled_code() -> None:
    """Let this process keep compiled code in vLLM's cache folder; a folder that `VARIABLE` names stays."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("VLLM_CACHE_ROOT") or Path(user_cache, "vllm"))
    os.environ.setdefault(VARIABLE, str(root.expanduser() / "omni_torch_compile"))
