"""Paths of LoRA adapters that clients give: only files within the folders of `--lora-dir`. No torch here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePath

from vllm_omni.inputs.adapter_files import PEFT_CONFIG, PEFT_FILE, WEIGHTS, adapter_file
from vllm_omni.inputs.field_values import WrongValueError

MAX_PATH_CHARACTERS = 4096
_WITHIN = "a path within the folders of --lora-dir, without `..` and without links that lead out of them"


def file_within(path: str, folders: Sequence[str]) -> str:
    """Absolute path of the safetensors file at `path`, which lies in one of `folders` in truth.

    path: of the file, or of a folder with one; a relative path is looked up in each of `folders`, in their order.
    Raises WrongValueError; FileNotFoundError if `folders` may have such a path but do not. The errors say nothing of
    files elsewhere.
    """
    if len(path) > MAX_PATH_CHARACTERS or not path.isprintable() or ".." in PurePath(path).parts:
        raise WrongValueError(_WITHIN)
    places = [(os.path.join(folder, path), os.path.realpath(folder)) for folder in folders]
    within = [(place, root) for place, root in places if _is_within(place, root)]
    if not within or (len(within) < len(places) and not os.path.isabs(path)):  # a link of one folder leads out
        raise WrongValueError(_WITHIN)
    for place, root in within:
        if os.path.lexists(place):
            return _file_at(place, root)
    raise FileNotFoundError(path)


def path_in_folders(file: str, folders: Sequence[str]) -> str:
    """Path of an adapter's file from the folder of `folders` that has it, or else its name: for clients.

    A name that adapters have in common follows the name of the file's own folder.
    """
    for folder in folders:
        if Path(file).is_relative_to(root := os.path.realpath(folder)):
            return os.path.relpath(file, root)
    folder, name = os.path.split(file)
    return os.path.join(os.path.basename(folder), name) if name in (WEIGHTS, PEFT_FILE) else name


def _file_at(place: str, root: str) -> str:
    try:
        file = adapter_file(place)
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise WrongValueError("a safetensors file that can be read, or a folder with one") from error
    real = Path(os.path.realpath(file))  # settings are read beside a link and beside its target
    if not all(_is_within(each, root) for each in (real, file.with_name(PEFT_CONFIG), real.with_name(PEFT_CONFIG))):
        raise WrongValueError(_WITHIN)
    return str(file)


def _is_within(place: str | Path, root: str) -> bool:
    """Whether the real place of a path lies below the real folder `root`."""
    return Path(os.path.realpath(place)).is_relative_to(root)
