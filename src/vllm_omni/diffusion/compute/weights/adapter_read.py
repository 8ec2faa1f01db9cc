"""Reading of an adapter's file for a request: errors that name the file, and files that change meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vllm_omni.diffusion.compute.weights.adapter_file import AdapterFileError
from vllm_omni.diffusion.messages.adapters import AdapterKey
from vllm_omni.errors import InvalidRequestError, to_one_line
from vllm_omni.inputs.adapter_files import file_stamp

Contents = TypeVar("Contents")


def read_unchanged(key: AdapterKey, read: Callable[[Path], Contents]) -> Contents:
    """Result of `read` for the file, which is in the state of `key`, so that all ranks read the same.

    A file that changes meanwhile is refused, because its parts may be of two files. Raises InvalidRequestError, also
    for an AdapterFileError of `read`.
    """
    try:
        contents = read(Path(key.file))
    except AdapterFileError as error:
        if not file_stamp(key.file):
            raise InvalidRequestError(
                f"the LoRA adapter {key.file} cannot be read: its file is gone", param="lora_request"
            ) from error
        raise InvalidRequestError(
            f"the LoRA adapter {key.file} does not fit this model: {to_one_line(str(error))}", param="lora_request"
        ) from error
    if key.stamp and file_stamp(key.file) != key.stamp:
        raise InvalidRequestError(
            f"the LoRA adapter {key.file} has changed since it was named: send the request again", param="lora_request"
        )
    return contents
