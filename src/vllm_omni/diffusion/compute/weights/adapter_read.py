"""Reading of an adapter's file for a request: errors that name the file, and files that change meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vllm_omni.diffusion.compute.weights.adapter_file import AdapterFileError
from vllm_omni.diffusion.messages.adapters import AdapterKey, KeptFiles
from vllm_omni.errors import AdapterChangedError, InvalidRequestError, to_one_line
from vllm_omni.inputs.adapter_files import AdapterPaths, file_stamp, kept_state

Contents = TypeVar("Contents")


def read_unchanged(
    key: AdapterKey, read: Callable[[AdapterPaths], Contents], kept: KeptFiles | None = None
) -> Contents:
    """Result of `read` for the file, which is in the state of `key`, so that all ranks read the same.

    kept: the open files to read; None: those at the path of `key`. Raises AdapterChangedError for a file that was
    written since, whose parts may be of two files; InvalidRequestError for an AdapterFileError of `read`.
    """
    try:
        contents = read(_paths(key, kept))
    except AdapterFileError as error:
        if kept is not None and _has_changed(key, kept):
            raise _changed(key) from error
        if kept is None and not file_stamp(key.file):
            raise InvalidRequestError(
                f"the LoRA adapter {key.file} cannot be read: its file is gone", param="lora_request"
            ) from error
        reason = to_one_line(str(error))
        if kept is not None:
            reason = reason.replace(kept.weights, key.file)
        raise InvalidRequestError(
            f"the LoRA adapter {key.file} does not fit this model: {reason}", param="lora_request"
        ) from error
    if _has_changed(key, kept):
        raise _changed(key)
    return contents


def _paths(key: AdapterKey, kept: KeptFiles | None) -> AdapterPaths:
    if kept is None:
        return AdapterPaths.at(Path(key.file))
    return AdapterPaths(key.file, Path(kept.weights), tuple(map(Path, kept.settings)))


def _has_changed(key: AdapterKey, kept: KeptFiles | None) -> bool:
    """Whether the files at the path were replaced or written since the adapter was named, or the open ones written."""
    if kept is None:
        return bool(key.stamp) and file_stamp(key.file) != key.stamp
    try:
        return kept_state([kept.weights, *kept.settings]) != kept.state
    except OSError:
        return True


def _changed(key: AdapterKey) -> AdapterChangedError:
    return AdapterChangedError(
        f"the LoRA adapter {key.file} has changed since it was named: send the request again", param="lora_request"
    )
