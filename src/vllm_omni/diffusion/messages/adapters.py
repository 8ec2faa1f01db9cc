"""Files of adapters, and the workers' answers when they have read one. Plain data, sent as msgpack."""

from __future__ import annotations

from msgspec import Struct

from vllm_omni.diffusion.messages.item_error import ItemError


class AdapterKey(Struct, frozen=True):
    """A file in one state: a file that is replaced or written again becomes another adapter."""

    file: str
    """Absolute path of the safetensors file."""
    stamp: str = ""
    """Its `file_stamp`; empty: any state."""


class KeptFiles(Struct, frozen=True):
    """Files of an adapter that the engine keeps open: they can be read after they were removed or replaced."""

    weights: str
    """Path of the open safetensors file: `/proc/PID/fd/N`."""
    settings: tuple[str, ...]
    """Paths of the open files of settings."""
    state: str
    """`kept_state` of these paths when they were opened."""


class AdapterRead(Struct):
    """Result of reading a file on one rank, or on all ranks of a replica together."""

    key: AdapterKey
    seconds: float = 0.0
    num_bytes: int = 0
    """Bytes of the weights on one rank."""
    error: ItemError | None = None
    """Reason why the model does not take the file; None: it does."""
