"""Choice of a component's weight files by their names, as diffusers and transformers choose them. No torch here."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.folder_files import MODEL_INDEX, names_in, read_object, short
from vllm_omni.errors import ConfigError

STEMS = ("diffusion_pytorch_model", "model")
"""Names that diffusers and transformers give weight files, without variant and suffix."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
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


def choose_all(components: Mapping[str, Collection[str]], variant: str | None) -> dict[str, WeightNames]:
    """The choice for each component, from the names in its folder.

    Raises ConfigError for a component without files to load, and for a variant that no component has.
    """
    chosen: dict[str, WeightNames] = {}
    for component, names in components.items():
        choice = choose_names(names, variant)
        if choice is None:
            raise ConfigError(f"{component}/ {_why_none(names)}")
        chosen[component] = choice
    if variant is not None and all(choice.variant is None for choice in chosen.values()):
        there = sorted({name for names in components.values() for name in variants_in(names)})
        raise ConfigError(f"--variant takes one that the model has ({', '.join(there) or 'none'}), got {variant!r}")
    return chosen


def _why_none(names: Collection[str]) -> str:
    if variants := variants_in(names):
        return f"has weight files of the variants {', '.join(variants)} alone: choose one with --variant"
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return f"has no .safetensors file, but {pickles[0]}: only safetensors are read"
    return f"has no .safetensors file named {' or '.join(STEMS)} (other weight formats are not read)"


def variants_in(names: Iterable[str]) -> list[str]:
    """Variants of which there are weight files."""
    matches = (_VARIANT_FILE.fullmatch(name) for name in names)
    return sorted({match["new"] or match["old"] for match in matches if match is not None})


def component_variant(folder: Path, variant: str | None) -> str | None:
    """`variant` where the component in `folder` has files of it, else None."""
    chosen = choose_names(names_in(folder.parent, folder.name), variant)
    return None if chosen is None else chosen.variant


def safetensors_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Weight files of the component in `folder`, sharded or not. Raises ConfigError where one is missing."""
    root, component = folder.parent, folder.name
    names = names_in(root, component)
    chosen = choose_names(names, variant)
    if chosen is None:
        raise ConfigError(f"{component}/ {_why_none(names)}")
    if chosen.index is None:
        return [folder / name for name in chosen.files]
    place = f"{component}/{chosen.index}"
    shards = sorted(set(read_weight_map(read_object(root, place), place).values()))
    if missing := [name for name in shards if name not in names]:
        raise ConfigError(f"{component}/ lacks {', '.join(missing)}, which {chosen.index} names")
    return [folder / name for name in shards]


def read_weight_map(index: Mapping[str, Any], place: str) -> dict[str, str]:
    """Name of a weight -> name of its file, from the JSON of the index `place`.

    Raises ConfigError for names that are not of safetensors files in the same folder.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConfigError(f"{place}: weight_map must be a JSON object of names of files, got {short(weight_map)}")
    if not weight_map:
        raise ConfigError(f"{place}: weight_map is empty")
    for name in sorted(set(weight_map.values())):
        if name != Path(name).name or name in (".", ".."):
            raise ConfigError(f"{place} names {name!r}, which is not a file of the same folder")
        if not name.endswith(".safetensors"):
            raise ConfigError(f"{place} names {name!r}, which is no safetensors file")
    return weight_map


def read_components(index: Mapping[str, Any]) -> dict[str, str]:
    """Component -> its class, of those that a model has, from the JSON of its model_index.json.

    Raises ConfigError for an entry that is no pair of a library and a class, or no name of a folder.
    """
    components = {}
    for name, value in index.items():
        if not isinstance(value, list) or all(part is None for part in value):
            continue  # a setting of the pipeline, or a component that the model does without
        if len(value) != 2 or not all(isinstance(part, str) for part in value):
            raise ConfigError(f"{MODEL_INDEX}: {name} must be a list of a library and a class, got {short(value)}")
        if name != Path(name).name or name in (".", ".."):
            raise ConfigError(f"{MODEL_INDEX} names {name!r}, which is not a folder of the model")
        components[name] = value[1]
    return components


def has_weights(class_name: str) -> bool:
    """Whether a component of this class is a model."""
    return not any(word in class_name for word in ("Tokenizer", "Processor", "Extractor", "Scheduler"))
