"""Checkpoints as files: safetensors, with JSON in its metadata. Nothing in them is executable."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from vllm_omni.diffusion.messages.checkpoint import Checkpoint, CheckpointValue
from vllm_omni.errors import InvalidRequestError, error_line

_LENGTH_BYTES = 8
"""Bytes of the header's length, which a safetensors file begins with."""
_MAX_HEADER_BYTES = 2**20
_BYTES_PER_PIXEL = 3 * np.dtype(np.float32).itemsize
_ENTRY = "checkpoint"
"""Name of the JSON in the metadata."""


class _Facts(msgspec.Struct):
    """Everything in a file but its arrays."""

    key: str
    step: int
    dtypes: dict[str, str]
    values: dict[str, CheckpointValue]


class _Metadata(msgspec.Struct):
    checkpoint: str


class _Header(msgspec.Struct):
    metadata: _Metadata = msgspec.field(name="__metadata__")


def max_file_bytes(num_pixels: int) -> int:
    """Most bytes of the file of a request whose frames have `num_pixels` pixels in all.

    Latents are many times smaller than the frames in float32. So the limit leaves room for the scheduler's state too.
    """
    return _MAX_HEADER_BYTES + _BYTES_PER_PIXEL * num_pixels


def to_bytes(checkpoint: Checkpoint, key: str) -> bytes:
    """File of a checkpoint.

    key: names the model and the request; a file with another key is refused when it is read.
    """
    facts = _Facts(key, checkpoint.step, checkpoint.dtypes, checkpoint.values)
    arrays = {name: np.ascontiguousarray(array) for name, array in checkpoint.arrays.items()}  # strides are not saved
    return bytes(save(arrays, metadata={_ENTRY: msgspec.json.encode(facts).decode()}))


def from_bytes(data: bytes, key: str) -> Checkpoint:
    """Checkpoint of a file that `to_bytes` made.

    Raises InvalidRequestError for a file of another kind, a damaged one, and one with another key. Whether the
    checkpoint fits the request is checked later, where the request resumes from it.
    """
    try:
        arrays: dict[str, Any] = load(data)
        end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
        header = msgspec.json.decode(data[_LENGTH_BYTES:end], type=_Header)
        facts = msgspec.json.decode(header.metadata.checkpoint, type=_Facts)
    # KeyError: a dtype that NumPy lacks; RecursionError: JSON of too many levels.
    except (SafetensorError, msgspec.MsgspecError, ValueError, KeyError, RecursionError) as error:
        raise InvalidRequestError(f"the checkpoint cannot be read: {error_line(error)}", param="resume") from error
    if facts.key != key:
        raise InvalidRequestError(f"the checkpoint is of {facts.key!r:.120}, not of {key!r:.120}", param="resume")
    return Checkpoint(facts.step, arrays, facts.dtypes, facts.values)
