"""Headers of safetensors files: names, shapes and types of the weights, without their values. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from vllm_omni.diffusion.catalog.folder_files import open_file, regular_file
from vllm_omni.diffusion.catalog.model_index import STEMS, Stems
from vllm_omni.diffusion.catalog.weight_files import safetensors_files
from vllm_omni.errors import ConfigError

MAX_HEADER_BYTES = 100_000_000
"""Bytes of the largest header that the safetensors library reads."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Types in which a weight may be stored."""


class StoredWeight(NamedTuple):
    """Description of a tensor in the header of a file."""

    file: str
    """Path of the file relative to the model folder."""
    dtype: str
    """Name of the type in the safetensors format, such as F32."""
    shape: tuple[int, ...]


def stored_weights(folder: Path, variant: str | None = None, stems: Stems = STEMS) -> dict[str, StoredWeight]:
    """Name -> description of each weight in the weight files of the component in `folder`.

    As in diffusers and transformers, the files' headers count, not their index; for a weight in two shards the last
    shard counts. Raises ConfigError, with the file and the reason, for files that are missing or broken.
    """
    weights: dict[str, StoredWeight] = {}
    for file in safetensors_files(folder, variant, stems):
        weights |= read_header(folder.parent, f"{folder.name}/{file.name}")
    return weights


def read_header(root: Path, name: str) -> dict[str, StoredWeight]:
    """Name -> description of each weight in the safetensors file `name` of the model folder `root`.

    Raises ConfigError, with the file and the reason, for a truncated file or one of another format.
    """
    from safetensors import SafetensorError, safe_open

    path = regular_file(root, name)
    try:
        with safe_open(path, framework="np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
            return {key: StoredWeight(name, part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ConfigError(_why_unreadable(root, name, error)) from error


def _why_unreadable(root: Path, name: str, error: Exception) -> str:
    """Reason, in one line, why the safetensors library refused a file with `error`."""
    with open_file(root, name) as stream:
        try:
            size = stream.seek(0, 2)
            stream.seek(0)
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if size < 8 or length > MAX_HEADER_BYTES:
                begin = f", begins with {start!r} and has no header" if start else ""
                return f"{name} is no safetensors file: it has {size} bytes{begin}"
            header = stream.read(length)
        except OSError as failure:
            return f"cannot read {name}: {failure.strerror}"
    if len(header) < length:
        return f"{name} is truncated: it has {size} bytes, its header alone needs {8 + length}"
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        needed = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        is_truncated = size < needed
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError) as failure:
        return f"{name} is no safetensors file: its header cannot be read ({failure!r})"
    if is_truncated:
        return f"{name} is truncated: it has {size} bytes and needs {needed}"
    return f"{name} is no safetensors file: {error}"


def check_types(component: str, weights: Mapping[str, StoredWeight]) -> None:
    """Raise ConfigError for a component without weights, or with some that are not floating point."""
    if not weights:
        raise ConfigError(f"the weight files of {component}/ hold no weights")
    for name, weight in weights.items():
        if name.endswith((".weight", ".bias")) and weight.dtype not in FLOATS:
            raise ConfigError(
                f"{weight.file}: {name} is stored as {weight.dtype}; weights are read from {', '.join(FLOATS)}"
            )
