"""Adapter files: the changes of weights in them, and the model's layers by the names of any common program."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vllm_omni.diffusion.compute.weights.adapter_tensors import read_tensor_header, read_tensors
from vllm_omni.diffusion.compute.weights.float8_scales import without_scales
from vllm_omni.inputs.adapter_files import PEFT_CONFIG, AdapterPaths
from vllm_omni.inputs.field_values import shown

METADATA_KEY = "lora_adapter_metadata"
"""Key of a file's header for the peft settings that diffusers saves, as JSON of `component.setting` or of `setting`."""
PEFT_PREFIX = "base_model.model."
LOW_RANK = re.compile(
    r"(?P<layer>.+?)(?P<mark>[._](?:lora\d?|lora_linear_layer))?[._](?P<part>lora_A|lora_B|lora_down|lora_up|down|up)"
    r"(?:\.\w+)?\.weight"
)
"""Keys of peft, Kohya, OneTrainer, XLabs and older diffusers."""
KRONECKER = re.compile(r"(?P<layer>.+)\.lokr_w(?P<part>[12](?:_[ab])?)")
PREFIXES = {
    "lora_unet_": ("unet_", "transformer_"),
    "lora_transformer_": ("transformer_",),
    "lora_te_": ("text_encoder_",),
    "lora_te1_": ("text_encoder_",),
    "lora_te2_": ("text_encoder_2_",),
    "lora_te3_": ("text_encoder_3_",),
    "base_model_model_": ("unet_", "transformer_"),
    "model_diffusion_model_": ("unet_", "transformer_"),
    "diffusion_model_": ("unet_", "transformer_"),
    "": ("transformer_",),
}
"""Prefix of Kohya, OneTrainer, peft or ComfyUI -> components that it may stand for; a model has one of them."""
OPTIONAL_PARTS = ("text_model_", "processor_")
"""Parts of names that only some versions of the libraries have."""
DOWN_PARTS = ("lora_A", "lora_down", "down")
MAX_ALPHA = 1e6
"""Largest alpha in the settings of a file; usual ones are at most a few times the rank."""
MAX_ECHO = 64
"""Most characters of a file's text that an error repeats."""
NUM_NAMED_KEYS = 3
"""Most keys that an error names; it counts the others."""
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Dtypes of weights."""
ALPHA_DTYPES = (*DTYPES, torch.int64, torch.int32)
"""Dtypes of alphas."""
ALPHA_END = ".alpha"
"""End of the key of an alpha."""


class AdapterFileError(ValueError):
    """A file is no usable adapter."""


@dataclass(frozen=True)
class WeightChange(ABC):
    """Change of the weight of a layer, stored as factors."""

    layer: str
    """Name of the layer in the file."""
    keys: tuple[str, ...]
    """Keys of the `weights` in the file."""
    weights: tuple[Tensor, ...]
    scale: float

    @property
    def origin(self) -> float:
        """Fingerprint of the first weight: equal for changes that share it."""
        return _energy(self.weights[0].double())

    @abstractmethod
    def energy(self) -> float:
        """Sum of the squares of all values of the change."""

    def scaled(self) -> dict[str, Tensor]:
        """Weights of the same change with scale 1. Raises AdapterFileError for values that become infinite."""
        *others, last = self.weights
        scaled = last.float() * self.scale
        if not bool(scaled.isfinite().all()):
            raise AdapterFileError(f"{self.keys[-1]} times its scale {self.scale:g} holds infinite values")
        return dict(zip(self.keys, (*others, scaled), strict=True))


class LowRank(WeightChange):
    """Change scale * up @ down; weights: down, up."""

    def energy(self) -> float:
        # tr(up^T up down down^T) is the energy of up @ down.
        down, up = (weight.flatten(1).double() for weight in self.weights)
        return self.scale**2 * float(((up.T @ up) * (down @ down.T)).sum())


@dataclass(frozen=True)
class Kronecker(WeightChange):
    """Change scale * (w1 kron w2); each factor is stored whole or as a product a @ b."""

    num_first: int
    """Number of weights of w1, 1 or 2; the others are those of w2."""

    def energy(self) -> float:
        weights = [weight.double() for weight in self.weights]
        factors = weights[: self.num_first], weights[self.num_first :]
        return self.scale**2 * math.prod(
            _energy(factor[0] if len(factor) == 1 else torch.matmul(*factor)) for factor in factors
        )


def _energy(values: Tensor) -> float:
    return float(values.square().sum())


@dataclass(frozen=True)
class AdapterFile:
    """Weights of a file by key, and their peft settings by component ("": all components)."""

    weights: Mapping[str, Tensor]
    configs: Mapping[str, Mapping[str, Any]]
    file_keys: Mapping[str, str] = field(default_factory=dict)
    """Renamed key -> key in the file."""

    @classmethod
    def read(cls, paths: AdapterPaths, check: Callable[[AdapterFile], object] | None = None) -> AdapterFile:
        """Read an adapter. Raises AdapterFileError if it is no safetensors file, or for unusable settings or values.

        check: called before any weight is read, with an adapter of the same dtypes and shapes, but without values,
        alphas and settings; it may raise AdapterFileError.
        """
        try:
            header = read_tensor_header(paths.weights)
            configs = _read_configs(paths.settings, header.metadata)
            outlines = without_scales(header.outlines)
            _check_dtypes(outlines)
            if check is not None:
                check(cls({key: each for key, each in outlines.items() if not key.endswith(ALPHA_END)}, {}))
            # Sorted, because all ranks need the same order.
            weights = without_scales(dict(sorted(read_tensors(paths.weights, header).items())))
        except AdapterFileError:
            raise
        except (OSError, SafetensorError, ValueError) as error:
            raise AdapterFileError(str(error)) from error
        for key, weight in weights.items():
            if not bool(weight.float().isfinite().all()):
                raise AdapterFileError(f"{key} holds values that are not numbers (NaN or infinite)")
        return cls(weights, configs)

    @cached_property
    def changes(self) -> list[WeightChange]:
        """Changes in the file. Raises AdapterFileError for weights that lack a partner or do not fit together."""
        low_rank: dict[tuple[str, str], dict[str, str]] = {}
        kronecker: dict[str, dict[str, str]] = {}
        for key in self.weights:
            if match := LOW_RANK.fullmatch(key):
                part = "down" if match["part"] in DOWN_PARTS else "up"
                low_rank.setdefault((match["layer"], match["mark"] or ""), {})[part] = key
            elif match := KRONECKER.fullmatch(key):
                kronecker.setdefault(match["layer"], {})[match["part"]] = key
        return [
            *(self._low_rank(layer, mark, keys) for (layer, mark), keys in low_rank.items()),
            *(self._kronecker(layer, keys) for layer, keys in kronecker.items()),
        ]

    @cached_property
    def others(self) -> dict[str, Tensor]:
        """Weights that are neither part of `changes` nor an alpha: biases and magnitudes of layers, for example."""
        used = {key for change in self.changes for key in change.keys} | set(self._alphas)
        return {key: weight for key, weight in self.weights.items() if key not in used}

    @property
    def has_scales(self) -> bool:
        return any(change.scale != 1 for change in self.changes)

    def with_names_of(self, layers: Mapping[str, str]) -> AdapterFile | None:
        """Adapter renamed to the model's layers, with a scale of 1 everywhere; layers not found keep their names.

        layers: from `layers_by_flat_name`. None: no layer is found, or the file has other weights than pairs.
        """
        if self.others:
            return None
        weights: dict[str, Tensor] = {}
        file_keys: dict[str, str] = {}
        for change in self.changes:
            layer = find_layer(change.layer, layers) if isinstance(change, LowRank) else None
            names = {key: key for key in change.keys}
            if layer is not None and f"{layer}.lora_A.weight" not in weights:
                names = dict(zip(change.keys, (f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"), strict=True))
                file_keys |= {name: key for key, name in names.items()}
            weights |= {names[key]: weight for key, weight in change.scaled().items()}
        return AdapterFile(weights, {}, file_keys) if file_keys else None

    def with_scales_in_weights(self, keeps_alphas: bool = False) -> AdapterFile:
        """Adapter with its scales multiplied into the weights, so that it needs neither alphas nor settings.

        keeps_alphas: whether there still are alphas, equal to the ranks, for programs that require them.
        """
        weights = {key: weight for change in self.changes for key, weight in change.scaled().items()}
        scales = {key.rpartition(".")[0]: change.scale for change in self.changes for key in change.keys}
        for key, weight in self.others.items():
            scale = scales.get(key.rpartition(".")[0], 1.0) if key.endswith(".bias") else 1.0
            weights[key] = weight.float() * scale if scale != 1 else weight
        if keeps_alphas:
            for change in self.changes:
                weights |= {
                    key: torch.tensor(float(change.weights[0].shape[0]))
                    for key in self._alphas
                    if change.keys[0].startswith(key.removesuffix("alpha"))
                }
        return AdapterFile(weights, {})

    @cached_property
    def _alphas(self) -> dict[str, float]:
        """Alphas by key. Raises AdapterFileError for an alpha that is not one number."""
        alphas = {}
        for key, weight in self.weights.items():
            if key.endswith(ALPHA_END):
                if weight.numel() != 1:
                    raise AdapterFileError(f"{key} takes one number, got the shape {list(weight.shape)}")
                alphas[key] = float(weight)
        return alphas

    def _low_rank(self, layer: str, mark: str, keys: Mapping[str, str]) -> LowRank:
        if len(keys) < 2:
            (key,) = keys.values()
            raise AdapterFileError(f"{key} has no partner: an adapter has two weights for each layer")
        down, up = self.weights[keys["down"]], self.weights[keys["up"]]
        if down.dim() < 2 or up.dim() < 2 or down.shape[0] != up.shape[1]:
            raise AdapterFileError(
                f"{keys['down']} {list(down.shape)} and {keys['up']} {list(up.shape)} do not fit together"
            )
        if (rank := down.shape[0]) == 0:
            raise AdapterFileError(f"{keys['down']} has rank 0")
        return LowRank(layer, (keys["down"], keys["up"]), (down, up), self._scale((layer, layer + mark), rank))

    def _kronecker(self, layer: str, keys: Mapping[str, str]) -> Kronecker:
        names: list[tuple[str, ...]] = []
        for number in "12":
            whole, parts = keys.get(number), [keys.get(f"{number}_{part}") for part in "ab"]
            names.append((whole,) if whole is not None else tuple(part for part in parts if part is not None))
            if whole is None and len(names[-1]) < 2:
                raise AdapterFileError(f"{layer}.lokr_w{number} is missing, or half of it")
        factors = [[self.weights[key] for key in part] for part in names]
        for part, factor in zip(names, factors):
            shapes = [list(weight.shape) for weight in factor]
            if len(factor) == 2 and not (len(shapes[0]) == len(shapes[1]) == 2 and shapes[0][1] == shapes[1][0] > 0):
                raise AdapterFileError(f"{part[0]} {shapes[0]} and {part[1]} {shapes[1]} do not fit together")
        ranks = [factor[0].shape[1] for factor in factors if len(factor) == 2]
        # The scale is relative to the rank; two whole factors have no rank.
        scale = self._scale((layer,), ranks[-1]) if ranks else 1.0
        return Kronecker(layer, (*names[0], *names[1]), (*factors[0], *factors[1]), scale, len(names[0]))

    def _scale(self, layers: tuple[str, ...], rank: int) -> float:
        """alpha / rank; 1 without an alpha. layers: names that the file may use for the layer."""
        for layer in layers:
            if (alpha := self._alphas.get(f"{layer}.alpha")) is not None:
                return alpha / rank
        for component, config in self.configs.items():
            if layers[0].startswith(prefix := f"{component}." if component else ""):
                return _peft_scale(config, layers[0].removeprefix(prefix).removeprefix(PEFT_PREFIX), rank)
        return 1.0

    def unused_alphas(self) -> list[str]:
        """Keys of alphas that belong to no change."""
        layers = {change.layer for change in self.changes}
        for match in map(LOW_RANK.fullmatch, self.weights):
            if match is not None:
                layers.add(match["layer"] + (match["mark"] or ""))
        return [key for key in self._alphas if key.removesuffix(ALPHA_END) not in layers]


def _check_dtypes(weights: Mapping[str, Tensor]) -> None:
    """Raise AdapterFileError for weights of other dtypes, and if there are none."""
    if not weights:
        raise AdapterFileError("it holds no weights")
    for key, weight in weights.items():
        if weight.dtype not in (taken := ALPHA_DTYPES if key.endswith(ALPHA_END) else DTYPES):
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in taken)
            raise AdapterFileError(f"{key} takes {names}, got {str(weight.dtype).removeprefix('torch.')}")


def _peft_scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rslora, as peft computes it from the settings of an adapter."""
    from peft.utils.other import get_pattern_key  # most adapters of packed families need no peft

    pattern: Mapping[str, float] = config.get("alpha_pattern") or {}
    default = config.get("lora_alpha", config.get("alpha", rank))
    alpha = float(pattern.get(get_pattern_key(list(pattern), layer), default))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_configs(settings: Sequence[Path], metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Settings of peft by component. Raises ValueError for invalid JSON and for values that peft does not take."""
    configs: dict[str, dict[str, Any]] = {}
    for name, value in _json_object(METADATA_KEY, metadata.get(METADATA_KEY, "{}")).items():
        component, _, setting = name.rpartition(".")  # a model saves its settings without its component's name
        configs.setdefault(component, {})[setting] = value
    for beside in settings:
        if not configs and beside.is_file():
            configs[""] = _json_object(PEFT_CONFIG, beside.read_text())
    for config in configs.values():
        _check_config(config)
    return configs


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError:
        value = None
    if not isinstance(value, dict):
        raise AdapterFileError(f"{name} takes a JSON object, got {text[:MAX_ECHO]}")
    return value


LAYER_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.)*\$?")
"""Names of layers, which peft reads as regular expressions. A file's own expressions could match for hours."""
PATTERNS = ("alpha_pattern", "rank_pattern", "target_modules", "exclude_modules", "layers_pattern")


def _check_config(config: Mapping[str, Any]) -> None:
    """Raise AdapterFileError for values of the settings that `_peft_scale` reads which peft does not take."""
    for name in ("lora_alpha", "alpha"):
        if name in config:
            _check_alpha(name, config[name])
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise AdapterFileError(f"alpha_pattern takes a JSON object of layers and numbers, got {shown(pattern)}")
    for layer, alpha in pattern.items():
        _check_alpha(f"alpha_pattern {layer[:MAX_ECHO]!r}", alpha)
    for name in PATTERNS:
        value = config.get(name) or ()
        for layer in [value] if isinstance(value, str) else value if isinstance(value, list | dict) else ():
            if not (isinstance(layer, str) and LAYER_PATTERN.fullmatch(layer)):
                raise AdapterFileError(f"{name} takes names of layers, got {shown(layer)}")
    if not isinstance(rslora := config.get("use_rslora", False), bool):
        raise AdapterFileError(f"use_rslora takes true or false, got {shown(rslora)}")


def _check_alpha(name: str, alpha: object) -> None:
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not (is_number and -MAX_ALPHA <= cast(float, alpha) <= MAX_ALPHA):
        raise AdapterFileError(f"{name} takes a number from {-MAX_ALPHA:g} to {MAX_ALPHA:g}, got {shown(alpha)}")


def layers_by_flat_name(models: Mapping[str, nn.Module]) -> dict[str, str]:
    """Flat name of a layer that adapters can change -> `component.layer`; ambiguous names are left out.

    models: components by their names. A flat name has an underscore for each dot and no `OPTIONAL_PARTS`.
    """
    paths = [f"{component}.{layer}" for component, model in models.items() for layer in _layers(model, "")]
    counts = Counter(map(flat_name, paths))
    return {flat: path for path in paths if counts[flat := flat_name(path)] == 1}


def find_layer(name: str, layers: Mapping[str, str]) -> str | None:
    """The `component.layer` for a layer's `name` in a file; None: the model has no such layer."""
    flat = flat_name(name)
    candidates = [flat]
    for prefix, components in PREFIXES.items():
        if flat.startswith(prefix):
            candidates += [component + flat.removeprefix(prefix) for component in components]
    return next((layers[candidate] for candidate in candidates if candidate in layers), None)


def _layers(module: nn.Module, path: str) -> Iterator[str]:
    """Paths of the modules with a weight; a module with adapters counts as one layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(module, BaseTunerLayer) or isinstance(getattr(module, "weight", None), nn.Parameter):
        yield path
        return
    for name, child in module.named_children():
        yield from _layers(child, f"{path}.{name}" if path else name)


def flat_name(name: str) -> str:
    """Name of a layer with an underscore for each dot, and without `OPTIONAL_PARTS`."""
    flat = name.replace(".", "_")
    for part in OPTIONAL_PARTS:
        flat = flat.replace(part, "")
    return flat


def listed(keys: Sequence[str]) -> str:
    """The first of the keys, and the number of the others."""
    named, more = ", ".join(keys[:NUM_NAMED_KEYS]), len(keys) - NUM_NAMED_KEYS
    return named + f" and {more} more" * (more > 0)
