"""The level of our loggers, as in vLLM."""

from __future__ import annotations

import logging
import os

from vllm_omni.errors import ConfigError

LEVEL_VARIABLE = "VLLM_LOGGING_LEVEL"


def logging_level() -> int:
    """The level that VLLM_LOGGING_LEVEL names; INFO without it. Raises ConfigError."""
    name = os.environ.get(LEVEL_VARIABLE) or "INFO"
    level = logging.getLevelNamesMapping().get(name.upper())
    if level is None:
        raise ConfigError(f"{LEVEL_VARIABLE} takes DEBUG, INFO, WARNING, ERROR or CRITICAL, got {name!r}")
    return level
