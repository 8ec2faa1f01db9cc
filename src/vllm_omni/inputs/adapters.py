"""Adapters that a server offers, as callers see them. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

AdapterSource = Literal["start", "loaded", "folder"]
"""Origin of a served adapter: `--lora-modules`, `load_lora`, or a file of a `--lora-dir` folder."""
AdapterState = Literal["device", "host", "disk"]
"""Where the weights of a served adapter are: on the device, in host memory, or only in the file."""


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that requests may name."""

    name: str
    file: str
    """Absolute path of the safetensors file: see `adapter_file`."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters of a request that names the adapter and does not give them, by field."""
    source: AdapterSource = "start"


@dataclass(frozen=True)
class AdapterStats:
    """Numbers of adapters of an engine. Replicas load the same file each; the sums are over all replicas."""

    states: Mapping[AdapterState, int]
    """Served adapters by state; each is counted once, at the fastest state that it has on any replica."""
    loads: int = 0
    """Files read."""
    evictions: int = 0
    """Adapters dropped from the device or from host memory to make room for others."""
    load_seconds: float = 0.0
    """Sum of the seconds that the reads took."""
