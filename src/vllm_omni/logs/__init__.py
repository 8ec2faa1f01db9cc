"""Logging that never blocks or ends our processes, even if nobody reads their standard output and error."""

from __future__ import annotations

import logging
import os

from vllm_omni.errors import ConfigError
from vllm_omni.logs.streams import QueuedStreams, fill_standard_descriptors

__all__ = ["QueuedStreams", "fill_standard_descriptors", "logging_level"]

LEVEL_VARIABLE = "VLLM_LOGGING_LEVEL"


def logging_level() -> int:
    """Level named by VLLM_LOGGING_LEVEL; INFO if it is not set. Raises ConfigError for an unknown name."""
    name = os.environ.get(LEVEL_VARIABLE) or "INFO"
    level = logging.getLevelNamesMapping().get(name.upper())
    if level is None:
        raise ConfigError(f"{LEVEL_VARIABLE} takes DEBUG, INFO, WARNING, ERROR or CRITICAL, got {name!r}")
    return level
