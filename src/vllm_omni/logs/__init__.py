"""Logging that never blocks or ends our processes, even if nobody reads their standard output and error."""

from __future__ import annotations

from vllm_omni.logs.descriptors import fill_standard_descriptors
from vllm_omni.logs.level import logging_level
from vllm_omni.logs.streams import QueuedStreams

__all__ = ["QueuedStreams", "fill_standard_descriptors", "logging_level"]
