"""Headers of safetensors files: names, shapes and types of the weights. No tensor is read. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vllm_omni.diffusion.folder_files import names_in, open_file, read_object
from vllm_omni.diffusion.weight_files import choose_names, read_weight_map, safetensors_files
from vllm_omni.errors import ConfigError

MAX_HEADER_BYTES = 100_000_000
"""Largest header that the safetensors library reads."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Types that a weight may be stored in."""


class StoredWeight(NamedTuple):
    """A tensor as the header of a file describes it."""

    file: str
    """Path of the file relative to the model folder."""
    dtype: str
    """The format's name, such as F32."""
    shape: tuple[int, ...]


def stored_weights(folder: Path, variant: str | None = None) -> dict[str, StoredWeight]:
    """Name -> weight, of all weight files of the component in `folder`.

    Raises ConfigError, with the file and the reason, for files that are missing or broken, that hold a weight twice, or
    that do not hold what their index says.
    """
    root = folder.parent
    weights: dict[str, StoredWeight] = {}
    for file in safetensors_files(folder, variant):
        for name, weight in read_header(root, f"{folder.name}/{file.name}").items():
            if name in weights:
                raise ConfigError(f"{weight.file} has the weight {name}, which {weights[name].file} has too")
            weights[name] = weight
    chosen = choose_names(names_in(root, folder.name), variant)
    if chosen is not None and chosen.index is not None:
        place = f"{folder.name}/{chosen.index}"
        for name, file_name in read_weight_map(read_object(root, place), place).items():
            if name not in weights or weights[name].file != f"{folder.name}/{file_name}":
                raise ConfigError(f"{place} says that {file_name} has the weight {name}, which it lacks")
    return weights


def read_header(root: Path, name: str) -> dict[str, StoredWeight]:
    """Weights in the safetensors file `name` of the model folder `root`.

    Raises ConfigError, with the file and the reason, for a file that is truncated or something else.
    """
    with open_file(root, name) as stream:
        try:
            size = stream.seek(0, 2)
            stream.seek(0)
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if size < 8 or length > MAX_HEADER_BYTES:
                begin = f", begins with {start!r} and has no header" if start else ""
                raise ConfigError(f"{name} is no safetensors file: it has {size} bytes{begin}")
            header = stream.read(length)
        except OSError as error:
            raise ConfigError(f"cannot read {name}: {error.strerror}") from error
    if len(header) < length:
        raise ConfigError(f"{name} is truncated: it has {size} bytes, its header alone needs {8 + length}")
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        weights = {key: _weight(name, tensor) for key, tensor in tensors.items()}
        needed = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{name} is no safetensors file: its header cannot be read ({error!r})") from error
    if size < needed:
        raise ConfigError(f"{name} is truncated: it has {size} bytes and needs {needed}")
    _check_with_library(root, name)
    return weights


def _weight(file: str, tensor: dict[str, Any]) -> StoredWeight:
    return StoredWeight(file, str(tensor["dtype"]), tuple(int(n) for n in tensor["shape"]))


def _check_with_library(root: Path, name: str) -> None:
    """Raise ConfigError for a header that the safetensors library does not accept."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(root / name, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{name} is no safetensors file: {error}") from error


def check_types(component: str, weights: Mapping[str, StoredWeight]) -> None:
    """Raise ConfigError for a component without weights, or with some that are not floating point."""
    if not weights:
        raise ConfigError(f"the weight files of {component}/ hold no weights")
    for name, weight in weights.items():
        if name.endswith((".weight", ".bias")) and weight.dtype not in FLOATS:
            raise ConfigError(
                f"{weight.file}: {name} is stored as {weight.dtype}; weights are read from {', '.join(FLOATS)}"
            )
