"""Checkpoints as files: safetensors, with JSON in its metadata. Nothing in them is executable."""

from __future__ import annotations

import json

from safetensors import SafetensorError
from safetensors.numpy import load, save

from vllm_omni.diffusion.messages.checkpoint import Checkpoint
from vllm_omni.errors import InvalidRequestError, error_line

_HEADER_LENGTH_BYTES = 8
_METADATA = "__metadata__"


def to_bytes(checkpoint: Checkpoint, key: str) -> bytes:
    """File of a checkpoint. `key` names model and request: a file with another one is refused when it is read."""
    facts = {"key": key, "step": checkpoint.step, "dtypes": checkpoint.dtypes, "values": checkpoint.values}
    return bytes(save(checkpoint.arrays, metadata={"checkpoint": json.dumps(facts, allow_nan=False)}))


def from_bytes(data: bytes, key: str) -> Checkpoint:
    """Checkpoint in a file of `to_bytes`. Raises InvalidRequestError for other files, and for another `key`."""
    try:
        arrays = load(data)
        length = int.from_bytes(data[:_HEADER_LENGTH_BYTES], "little")
        header = json.loads(data[_HEADER_LENGTH_BYTES : _HEADER_LENGTH_BYTES + length])
        facts = json.loads(header[_METADATA]["checkpoint"])
        if facts["key"] != key:
            raise InvalidRequestError(
                f"the checkpoint is of {facts['key']!r:.120}, not of {key!r:.120}", param="resume"
            )
        return Checkpoint(int(facts["step"]), arrays, dict(facts["dtypes"]), dict(facts["values"]))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise InvalidRequestError(f"the checkpoint cannot be read: {error_line(error)}", param="resume") from error
