"""Choice of a component's weight files by name, the same as in diffusers and transformers. No torch here."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.catalog.folder_files import names_in, read_object
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
    """Weight files to load among the files `names` of a component; None: there are none, or files of several `stems`.

    A component without files of `variant` is loaded from the files without variant, as diffusers does.
    """
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
    components: Mapping[str, Component], folders: Mapping[str, Collection[str]], variant: str | None
) -> dict[str, WeightNames]:
    """Weight files to load of each component that has weights. `folders`: component -> names of its files.

    Raises ConfigError for a component without files to load, and for a variant that no component has.
    """
    chosen: dict[str, WeightNames] = {}
    models = {name: names for name, names in folders.items() if has_weights(components[name], names)}
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
    shards = sorted(set(read_weight_map(read_object(root, place), place).values()))
    if missing := [name for name in shards if name not in names]:
        raise ConfigError(f"{component}/ lacks {', '.join(missing)}, which {chosen.index} names")
    return [folder / name for name in shards]


def read_weight_map(index: Mapping[str, Any], place: str) -> dict[str, str]:
    """Name of a weight -> name of its file, from the JSON of an index. `place`: the index file, for errors.

    Raises ConfigError for a name that is not a safetensors file in the same folder.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConfigError(f"{place}: weight_map must be a JSON object of names of files, got {shown(weight_map)}")
    if not weight_map:
        raise ConfigError(f"{place}: weight_map is empty")
    for name in sorted(set(weight_map.values())):
        if name != Path(name).name or name in (".", ".."):
            raise ConfigError(f"{place} names {name!r}, which is not a file of the same folder")
        if not name.endswith(".safetensors"):
            raise ConfigError(f"{place} names {name!r}, which is no safetensors file")
    return weight_map
