"""Level of our loggers, from the environment variable that vLLM reads."""

from __future__ import annotations

import logging
import os

from vllm_omni.errors import ConfigError

LEVEL_VARIABLE = "VLLM_LOGGING_LEVEL"


def logging_level() -> int:
    """Level named by VLLM_LOGGING_LEVEL; INFO if it is not set. Raises ConfigError for an unknown name."""
    name = os.environ.get(LEVEL_VARIABLE) or "INFO"
    level = logging.getLevelNamesMapping().get(name.upper())
    if level is None:
        raise ConfigError(f"{LEVEL_VARIABLE} takes DEBUG, INFO, WARNING, ERROR or CRITICAL, got {name!r}")
    return level
