"""Files of LoRA adapters. No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vllm_omni.errors import ConfigError
from vllm_omni.inputs.field_values import WrongValueError

WEIGHTS = "pytorch_lora_weights.safetensors"
"""Name that diffusers gives to the file in an adapter's folder."""
PEFT_FILE = "adapter_model.safetensors"
"""File of the weights in a folder of peft; the settings are in PEFT_CONFIG beside it."""
PEFT_CONFIG = "adapter_config.json"
"""File of an adapter's settings, which peft saves beside the weights."""
MAX_LINKS = 40
"""Most links that Linux follows for one path."""


def adapter_file(path: str | os.PathLike[str]) -> Path:
    """Absolute path of the safetensors file of the adapter at `path`: the file itself, or the one in the folder.

    The file's own name is kept if it is a link, as in the cache of Hugging Face: settings lie beside the link, not
    beside its target. Raises WrongValueError for anything else. Other formats are refused because reading a pickle can
    run code.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(place.glob("*.safetensors"))
        named = [file for file in files if file.name == WEIGHTS]
        if len(found := named or files) != 1:
            raise WrongValueError(f"a folder with {WEIGHTS} or one other safetensors file")
        return place.resolve() / found[0].name
    if place.suffix != ".safetensors" or not place.is_file():
        raise WrongValueError("a safetensors file that exists, or a folder with one")
    return place.parent.resolve() / place.name


def served_files(modules: Mapping[str, str]) -> dict[str, str]:
    """Files of the adapters of `--lora-modules`, by name. modules: name -> path.

    Raises ConfigError for a path without an adapter.
    """
    files = {}
    for name, path in modules.items():
        try:
            files[name] = str(adapter_file(path))
        except WrongValueError as error:
            raise ConfigError(f"--lora-modules {name} takes {error}, got {path!r}") from error
    return files


def file_identity(file: str) -> tuple[int, int] | str:
    """Device and inode, equal for all links to one file; the path itself if the file is gone."""
    try:
        found = os.stat(file)
    except OSError:
        return file
    return found.st_dev, found.st_ino


def file_stamp(file: str) -> str:
    """State of a file and of the settings beside it: it changes when one is replaced, written or touched. Empty: the
    file is gone.

    The time of the last change counts, which no program can set back, so that also a file of the same size and with an
    old modification time is noticed.
    """
    stamp = _stamp(file)
    try:
        return "/".join([stamp, *map(_stamp, settings_files(Path(file)))]) if stamp else ""
    except OSError:  # a link that is replaced meanwhile
        return ""


@dataclass(frozen=True)
class AdapterPaths:
    """Paths at which an adapter is read."""

    name: str
    """Path of the safetensors file by which errors and log lines name the adapter."""
    weights: Path
    """Where its safetensors file is read."""
    settings: tuple[Path, ...]
    """Where its settings may be; the first one that exists counts."""

    @classmethod
    def at(cls, file: Path) -> Self:
        """Paths of an adapter whose files lie where its user put them."""
        return cls(str(file), file, tuple(settings_files(file)))


def kept_state(paths: Iterable[str]) -> str:
    """State of open files: it changes when one is written. Other than a `file_stamp` it stays when one is removed.

    Raises OSError.
    """
    found = [os.stat(path) for path in paths]
    return "/".join(f"{file.st_dev:x}-{file.st_ino:x}-{file.st_size:x}-{file.st_mtime_ns:x}" for file in found)


def settings_files(file: Path) -> Iterator[Path]:
    """Places of the settings of an adapter: beside its file, which exists, and beside each target of its links."""
    place = file
    for _ in range(MAX_LINKS):
        if place.name == PEFT_FILE:
            yield place.with_name(PEFT_CONFIG)
        if not place.is_symlink():
            return
        place = place.parent / place.readlink()


def _stamp(file: str | Path) -> str:
    try:
        found = os.stat(file)
    except OSError:
        return ""
    return f"{found.st_dev:x}-{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}-{found.st_ctime_ns:x}"
