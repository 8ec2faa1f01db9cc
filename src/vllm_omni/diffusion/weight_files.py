"""Choice of a component's weight files by their names, as diffusers and transformers choose them. No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_omni.errors import ConfigError

STEMS = ("diffusion_pytorch_model", "model")
"""Names that diffusers and transformers give weight files, without variant and suffix."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER_BYTES = 100_000_000
"""Largest header that the safetensors library reads."""
_SHARD = r"-\d{5}-of-\d{5}"
_VARIANT_FILE = re.compile(
    rf"(?:{'|'.join(STEMS)})(?:\.(?P<new>[^.]+?)(?:{_SHARD})?|{_SHARD}\.(?P<old>[^.]+))\.safetensors"
)


@dataclass(frozen=True)
class WeightNames:
    """Names of the weight files of one component."""

    variant: str | None
    index: str | None
    """File that maps weights to shards; None: one file holds all weights."""
    files: tuple[str, ...]
    """The one file, or the shards that are there."""


def choose_names(names: Iterable[str], variant: str | None) -> WeightNames | None:
    """Names that are loaded of a component folder with the files `names`; None: it has none.

    A component without files of `variant` is loaded from the files without variant, as diffusers does.
    """
    present = set(names)
    for wanted in dict.fromkeys((variant, None)):
        for stem in STEMS:
            if (found := _choose_stem(present, stem, wanted)) is not None:
                return found
    return None


def _choose_stem(present: set[str], stem: str, variant: str | None) -> WeightNames | None:
    part = "" if variant is None else f".{variant}"
    single = f"{stem}{part}.safetensors"
    indices = (f"{stem}.safetensors.index{part}.json", f"{stem}.safetensors{part}.index.json")
    index = next((name for name in indices if name in present), None)
    # diffusers looks for an index first, transformers for a single file.
    if single in present and (index is None or stem == "model"):
        return WeightNames(variant, None, (single,))
    if index is None:
        return None
    word = re.escape(part)
    shard = re.compile(rf"{stem}(?:{word}{_SHARD}|{_SHARD}{word})\.safetensors")
    return WeightNames(variant, index, tuple(sorted(name for name in present if shard.fullmatch(name))))


def variants_in(names: Iterable[str]) -> list[str]:
    """Variants of which there are weight files."""
    matches = (_VARIANT_FILE.fullmatch(name) for name in names)
    return sorted({match["new"] or match["old"] for match in matches if match is not None})


def component_variant(folder: Path, variant: str | None) -> str | None:
    """`variant` where the component in `folder` has files of it, else None."""
    chosen = choose_names(_names_in(folder), variant)
    return None if chosen is None else chosen.variant


def safetensors_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Weight files of the component in `folder`, sharded or not. Raises ConfigError where one is missing."""
    names = _names_in(folder)
    chosen = choose_names(names, variant)
    if chosen is None:
        raise ConfigError(f"{folder.name}/ {_why_none(names)}")
    if chosen.index is None:
        return [folder / name for name in chosen.files]
    weight_map = read_object(folder / chosen.index).get("weight_map")
    place = f"{folder.name}/{chosen.index}"
    if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConfigError(f"{place}: weight_map must be a JSON object of names of files, got {short(weight_map)}")
    shards = sorted(set(weight_map.values()))
    if not shards:
        raise ConfigError(f"{place}: weight_map is empty")
    for name in shards:
        if name != Path(name).name or name in (".", ".."):
            raise ConfigError(f"{place} names {name!r}, which is not a file of the same folder")
        if not name.endswith(".safetensors"):
            raise ConfigError(f"{place} names {name!r}, which is no safetensors file")
    if missing := [name for name in shards if name not in names]:
        raise ConfigError(f"{folder.name}/ lacks {', '.join(missing)}, which {chosen.index} names")
    return [folder / name for name in shards]


def checked_files(folder: Path, variant: str | None = None) -> list[Path]:
    """`safetensors_files`, each with a header that fits its size. Raises ConfigError, with the file and the reason."""
    files = safetensors_files(folder, variant)
    for file in files:
        check_file(file)
    return files


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise ConfigError(f"{folder.name}/ cannot be read: {error.strerror}") from error


def _why_none(names: list[str]) -> str:
    if variants := variants_in(names):
        return f"has weight files of the variants {', '.join(variants)} alone: choose one with --variant"
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return f"has no .safetensors file, but {pickles[0]}: only safetensors are read"
    return f"has no .safetensors file named {' or '.join(STEMS)} (other weight formats are not read)"


def check_file(file: Path) -> None:
    """Raise ConfigError, with the file and the reason, for a safetensors file that is truncated or something else."""
    place = f"{file.parent.name}/{file.name}"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if start.startswith(b"version "):
                raise ConfigError(f"{place} is a Git LFS pointer, not the file itself; run git lfs pull")
            if size < 8 or length > MAX_HEADER_BYTES:
                raise ConfigError(f"{place} is no safetensors file: it has {size} bytes and no header")
            header = stream.read(length)
    except OSError as error:
        raise ConfigError(f"cannot read {place}: {error.strerror}") from error
    if len(header) < length:
        raise ConfigError(f"{place} is truncated: it has {size} bytes, its header alone needs {8 + length}")
    try:
        tensors = json.loads(header)
        ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
        needed = 8 + length + max(ends, default=0)
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{place} is no safetensors file: its header cannot be read ({error!r})") from error
    if size < needed:
        raise ConfigError(f"{place} is truncated: it has {size} bytes and needs {needed}")


def check_model(path: Path, variant: str | None) -> None:
    """Raise ConfigError for weight files of the model folder `path` that are missing or broken, and for a variant that
    no component has."""
    index = read_object(path / "model_index.json")
    folders = [path / name for name, value in index.items() if _has_weights(value)]
    for folder in folders:
        checked_files(folder, variant)
    if variant is not None and all(component_variant(folder, variant) is None for folder in folders):
        there = sorted({name for folder in folders for name in variants_in(_names_in(folder))})
        raise ConfigError(f"--variant takes one that the model has ({', '.join(there) or 'none'}), got {variant!r}")


def _has_weights(component: object) -> bool:
    """Whether an entry of model_index.json, [library, class], is a model."""
    if not isinstance(component, list) or len(component) != 2 or not isinstance(component[1], str):
        return False
    return not any(word in component[1] for word in ("Tokenizer", "Processor", "Extractor", "Scheduler"))


def read_object(file: Path) -> dict[str, Any]:
    """JSON object in `file`. Raises ConfigError, which names the file and its folder, for anything else."""
    place = f"{file.parent.name}/{file.name}"
    try:
        text = file.read_text(encoding="utf-8")
        if text.startswith("version https://git-lfs"):
            raise ConfigError(f"cannot read {place}: it is a Git LFS pointer, not the file itself; run git lfs pull")
        value = json.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {place}: {error.strerror}") from error
    except ConfigError:  # is a ValueError
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {place}: no valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"cannot read {place}: it must hold a JSON object, got {short(value)}")
    return value


def short(value: object) -> str:
    """`value` for an error line, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
