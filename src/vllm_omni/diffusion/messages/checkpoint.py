"""Checkpoint of a request: what its next denoising step depends on, beside the request itself. Plain data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np

from vllm_omni.errors import InvalidRequestError

CheckpointValue = int | float | str | None | list[int | float | str | None]
LATENTS = "latents"
"""Name of the latents among the arrays of a checkpoint."""
BITS = "int16"
"""NumPy dtype that holds the bits of bfloat16 values: NumPy has no bfloat16."""
STORED_DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": BITS}
"""PyTorch dtype of a tensor -> NumPy dtype of its array in a checkpoint."""
_NAME = re.compile(r"[a-z_]+(\.[a-z_]+)?(\.\d{1,2})?")
_EXPONENT = np.int16(0x7F80)
"""Exponent bits of bfloat16; all are set in NaN and infinite values."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """State of a request between two denoising steps; a request that resumes from it gives the same pixels.

    It holds no state of a step cache, so the first step after it is computed.
    """

    step: int
    """Denoising steps done."""
    arrays: dict[str, np.ndarray]
    """`latents`, and the tensors of the noise scheduler's state; of dtypes in `STORED_DTYPES`."""
    dtypes: dict[str, str]
    """Name of an array -> PyTorch dtype of the tensor, without `torch.`."""
    values: dict[str, CheckpointValue]
    """Facts of the request that the state depends on; a request with other facts is refused."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def check_checkpoint(checkpoint: Checkpoint, num_steps: int) -> None:
    """Raise InvalidRequestError for a checkpoint that no request of `num_steps` denoising steps can have written.

    Whether the shapes fit the request is checked by the worker.
    """
    try:  # a plan with another type could not be sent to the workers
        msgspec.convert(checkpoint.values, dict[str, CheckpointValue])
    except msgspec.ValidationError as error:
        raise unfit(f"values of a wrong type: {error}") from error
    if not isinstance(checkpoint.step, int) or not 1 <= checkpoint.step <= num_steps:
        raise unfit(f"step {checkpoint.step!r:.60}, this request has steps 1 to {num_steps}")
    if LATENTS not in checkpoint.arrays:
        raise unfit(f"no array {LATENTS!r}")
    if checkpoint.arrays.keys() != checkpoint.dtypes.keys():
        raise unfit("arrays and dtypes of different names")
    for name, array in checkpoint.arrays.items():
        _check_array(name, array, checkpoint.dtypes)


def _check_array(name: str, array: np.ndarray, dtypes: Mapping[str, str]) -> None:
    if not _NAME.fullmatch(name):
        raise unfit(f"an array named {name!r:.60}")
    dtype = dtypes[name]
    if not isinstance(array, np.ndarray):
        raise unfit(f"{name} of type {type(array).__name__}")
    if STORED_DTYPES.get(dtype) != str(array.dtype):
        raise unfit(f"{name} of dtype {dtype!r:.20}, stored as {array.dtype}")
    exponent_is_full = (array & _EXPONENT) == _EXPONENT if dtype == "bfloat16" else ~np.isfinite(array)
    if exponent_is_full.any():
        raise unfit(f"{name} with values that are not numbers (NaN or infinite)")


def unfit(fault: str) -> InvalidRequestError:
    """Error for a checkpoint that does not fit the request. fault: what the checkpoint has."""
    return InvalidRequestError(f"the checkpoint does not fit the request: it has {fault}", param="resume")
