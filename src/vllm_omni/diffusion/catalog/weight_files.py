"""A component's weight files: their choice, as in diffusers and transformers, and their headers. No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vllm_omni.diffusion.catalog.folder_files import names_in, open_path, read_object, regular_file
from vllm_omni.diffusion.catalog.model_index import STEMS, TRANSFORMERS_STEMS, Component, Stems
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.field_values import shown

CONFIG = "config.json"
"""Config file of a model; other components have files named *_config.json."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHARD = r"-\d{5}-of-\d{5}"
_WEIGHT_FILE = re.compile(rf"(?P<stem>{'|'.join(STEMS)})(?:[.-].*)?\.safetensors(?:\..*\bjson)?")
"""Pattern of weight files and index files, with or without variant."""
_VARIANT_FILE = re.compile(
    rf"(?P<stem>{'|'.join(STEMS)})(?:\.(?P<new>[^.]+?)(?:{_SHARD})?|{_SHARD}\.(?P<old>[^.]+))\.safetensors"
)


MAX_HEADER_BYTES = 100_000_000
"""Bytes of the largest header that the safetensors library reads."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Types in which a weight may be stored."""


@dataclass(frozen=True)
class WeightNames:
    """Names of the weight files of one component."""

    variant: str | None
    index: str | None
    """Name of the file that maps weights to shards; None: one file holds all weights."""
    files: tuple[str, ...]
    """Name of the one file, or of the shards in the folder."""


def has_weights(component: Component, names: Collection[str]) -> bool:
    """Whether a component is a model: from its class, or for an unknown class from its files' `names`."""
    if component.kind is not None:
        return False
    if CONFIG in names or any(name.endswith((".safetensors", *PICKLES)) for name in names):
        return True
    return not other_configs(names)


def other_configs(names: Iterable[str]) -> list[str]:
    """Names of config files of components that are not models; `generation_config.json` belongs to a model."""
    return [name for name in names if name.endswith("_config.json") and name != "generation_config.json"]


def choose_names(names: Iterable[str], variant: str | None, stems: Stems = STEMS) -> WeightNames | None:
    """Weight files of one stem among `names`, or None. Without files of `variant`: those without variant."""
    present = set(names)
    there = _stems_in(present, stems)
    if len(there) != 1:
        return None
    choices = (_choose_stem(present, there[0], wanted) for wanted in dict.fromkeys((variant, None)))
    return next((choice for choice in choices if choice is not None), None)


def _stems_in(names: Iterable[str], stems: Stems) -> list[str]:
    """Stems with safetensors files or an index in `names`."""
    found = {match["stem"] for name in names if (match := _WEIGHT_FILE.fullmatch(name)) is not None}
    return [stem for stem in stems if stem in found]


def _choose_stem(present: set[str], stem: str, variant: str | None) -> WeightNames | None:
    part = "" if variant is None else f".{variant}"
    single = f"{stem}{part}.safetensors"
    indices = (f"{stem}.safetensors.index{part}.json", f"{stem}.safetensors{part}.index.json")
    index = next((name for name in indices if name in present), None)
    # diffusers looks for an index first, transformers for a single file.
    if single in present and (index is None or stem in TRANSFORMERS_STEMS):
        return WeightNames(variant, None, (single,))
    if index is None:
        return None
    word = re.escape(part)
    shard = re.compile(rf"{stem}(?:{word}{_SHARD}|{_SHARD}{word})\.safetensors")
    return WeightNames(variant, index, tuple(sorted(name for name in present if shard.fullmatch(name))))


def choose_all(
    components: Mapping[str, Component],
    folders: Mapping[str, Collection[str]],
    variant: str | None,
    unread: Collection[str] = (),
) -> dict[str, WeightNames]:
    """Weight files by component, among its files in `folders`. unread: components whose weights are not read.

    Raises ConfigError, also for an unknown variant.
    """
    chosen: dict[str, WeightNames] = {}
    models = {
        name: names for name, names in folders.items() if name not in unread and has_weights(components[name], names)
    }
    for name, names in models.items():
        stems = components[name].stems
        choice = choose_names(names, variant, stems)
        if choice is None:
            raise ConfigError(f"{name}/ {_why_none(names, stems)}")
        chosen[name] = choice
    if variant is not None and all(choice.variant is None for choice in chosen.values()):
        there = sorted(
            {variant for name, names in models.items() for variant in variants_in(names, components[name].stems)}
        )
        raise ConfigError(f"--variant takes one that the model has ({', '.join(there) or 'none'}), got {variant!r}")
    return chosen


def _why_none(names: Collection[str], stems: Stems) -> str:
    if len(there := _stems_in(names, stems)) > 1:
        return f"has weight files named {' and '.join(there)}: remove those that the component's class does not read"
    if variants := variants_in(names, stems):
        return f"has weight files of the variants {', '.join(variants)} alone: choose one with --variant"
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return f"has no .safetensors file, but {pickles[0]}: only safetensors are read"
    return f"has no .safetensors file named {' or '.join(stems)} (other names and formats are not read)"


def variants_in(names: Iterable[str], stems: Stems = STEMS) -> list[str]:
    """Variants of the weight files among `names`, sorted."""
    matches = (_VARIANT_FILE.fullmatch(name) for name in names)
    return sorted({match["new"] or match["old"] for match in matches if match is not None and match["stem"] in stems})


def component_variant(folder: Path, variant: str | None, stems: Stems = STEMS) -> str | None:
    """`variant` if the component in `folder` has files of that variant, else None."""
    chosen = choose_names(names_in(folder.parent, folder.name), variant, stems)
    return None if chosen is None else chosen.variant


def safetensors_files(folder: Path, variant: str | None = None, stems: Stems = STEMS) -> list[Path]:
    """Weight files of the component in `folder`, one or several shards. Raises ConfigError if one is missing."""
    root, component = folder.parent, folder.name
    names = names_in(root, component)
    chosen = choose_names(names, variant, stems)
    if chosen is None:
        raise ConfigError(f"{component}/ {_why_none(names, stems)}")
    if chosen.index is None:
        return [folder / name for name in chosen.files]
    place = f"{component}/{chosen.index}"
    return [folder / name for name in read_shards(read_object(root, place), place, names)]


def read_shards(index: Mapping[str, Any], place: str, present: Collection[str]) -> list[str]:
    """Names of the files that hold the weights, sorted, from the JSON of an index.

    place: the index file, for errors; present: names of the files in its folder. Raises ConfigError for a name that is
    not a safetensors file among them.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConfigError(f"{place}: weight_map must be a JSON object of names of files, got {shown(weight_map)}")
    if not weight_map:
        raise ConfigError(f"{place}: weight_map is empty")
    shards = sorted(set(weight_map.values()))
    for name in shards:
        if name != Path(name).name or name in (".", ".."):
            raise ConfigError(f"{place} names {name!r}, which is not a file of the same folder")
        if not name.endswith(".safetensors"):
            raise ConfigError(f"{place} names {name!r}, which is no safetensors file")
    if missing := [name for name in shards if name not in present]:
        component, _, file = place.partition("/")
        raise ConfigError(f"{component}/ lacks {', '.join(missing)}, which {file} names")
    return shards


class ShardIndex(NamedTuple):
    """Index of a component's shards."""

    place: str
    """Path of the index relative to the model folder."""
    files: Mapping[str, str]
    """Name of a weight -> name of the file in which the index places it."""


def shard_index(folder: Path, variant: str | None = None, stems: Stems = STEMS) -> ShardIndex | None:
    """Index of the component in `folder`; None: one file holds all of its weights. Raises ConfigError."""
    root, component = folder.parent, folder.name
    names = names_in(root, component)
    chosen = choose_names(names, variant, stems)
    if chosen is None or chosen.index is None:
        return None
    place = f"{component}/{chosen.index}"
    index = read_object(root, place)
    read_shards(index, place, names)
    return ShardIndex(place, index["weight_map"])


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
    """Name -> description of each weight in a safetensors file. Raises ConfigError with the file and the reason."""
    return path_header(regular_file(root, name), name)


def path_header(path: Path, name: str) -> dict[str, StoredWeight]:
    """Name -> description of each weight in the file `path`. name: how descriptions and errors call the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
            return {key: StoredWeight(name, part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ConfigError(_why_unreadable(path, name, error)) from error


def _why_unreadable(path: Path, name: str, error: Exception) -> str:
    """Reason, in one line, why the safetensors library refused a file with `error`."""
    with open_path(path, name) as stream:
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
