"""LoRA adapters in the models of a whole pipeline, by diffusers and peft: those of one request are active."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vllm_omni.diffusion.compute.families.diffusers_fallback.adapter_check import unplaced_keys
from vllm_omni.diffusion.compute.families.diffusers_fallback.loading import without_progress_bars
from vllm_omni.diffusion.compute.weights.adapter_file import (
    AdapterFile,
    AdapterFileError,
    layers_by_flat_name,
    listed,
)
from vllm_omni.diffusion.messages.request import LoRA
from vllm_omni.errors import InvalidRequestError, to_one_line

MAX_UNSERVED = 8
"""Adapters kept besides the served ones; there may be more while as many are in use."""
MARKS = ("lora", "lokr", "alpha")
"""Parts of names: an adapter's weight has one of them. Other weights would replace the model's own."""
DOWN = ".lora_A.weight"
"""End of the name of a weight [rank, inputs of the layer]."""


class Adapters:
    """Loads adapters and switches between them; the model's own weights do not change."""

    def __init__(self, pipeline: Any, served: Iterable[str]) -> None:
        """served: files that are loaded now and kept. Raises InvalidRequestError for a file that does not fit."""
        self._pipeline = pipeline
        self._names: dict[str, str] = {}
        """File -> name of the loaded adapter in diffusers, least recently used first."""
        self._num_loaded = 0
        self._active: dict[str, float] = {}
        """Scales of the active adapters, by their names in diffusers."""
        self._served = frozenset(served)
        for file in sorted(self._served):
            self._load(file)

    def use(self, loras: Sequence[LoRA], under_way: Collection[str] = ()) -> None:
        """Activate these adapters alone, whose changes add up; load those that are missing.

        under_way: files in use. Raises InvalidRequestError.
        """
        in_use = {*under_way, *(lora.path for lora in loras)}
        wanted = {self._name_of(lora.path, in_use): lora.scale for lora in loras}
        if wanted == self._active:
            return
        if wanted:
            self._pipeline.enable_lora()
            self._pipeline.set_adapters(list(wanted), list(wanted.values()))
        else:
            self._pipeline.disable_lora()
        self._active = wanted

    def drop_idle(self, under_way: Collection[str], most: int | None = None) -> None:
        """Delete the least recently used idle adapters while there are more than `most` besides the served ones.

        under_way: files in use. most: None: `MAX_UNSERVED`.
        """
        most = MAX_UNSERVED if most is None else most
        unserved = [file for file in self._names if file not in self._served]
        idle = [file for file in unserved if file not in under_way]
        for file in idle[: max(len(unserved) - most, 0)]:
            self._delete(self._names.pop(file))

    def _name_of(self, file: str, under_way: Collection[str]) -> str:
        if file not in self._names:
            self.drop_idle(under_way, MAX_UNSERVED - 1)
            self._load(file)
        name = self._names[file] = self._names.pop(file)
        return name

    def _load(self, file: str) -> None:
        """Load a file. Raises InvalidRequestError unless the model has all of its weights at their scale.

        diffusers drops some keys or their alphas: then the weights are scaled here, renamed to the model's own layers
        where these are found, and loaded again.
        """
        try:
            contents = AdapterFile.read(Path(file))
            self._check(contents)
            name = self._load_first(self._attempts(contents, Path(file)))
        except AdapterFileError as error:
            raise InvalidRequestError(
                f"the LoRA adapter {file} does not fit this model: {to_one_line(str(error))}", param="lora_request"
            ) from error
        self._names[file] = name
        self._deactivate()

    def _attempts(self, contents: AdapterFile, file: Path) -> Iterator[tuple[AdapterFile, Path | dict[str, Tensor]]]:
        """Contents to load in turn: the file, then a changed copy of its weights, made on demand."""
        yield contents, file
        if again := contents.with_names_of(layers_by_flat_name(self._models())):
            yield again, {key: again.weights[key] for key in again.file_keys}
        elif contents.has_scales:
            again = contents.with_scales_in_weights()
            yield again, dict(again.weights)

    def _load_first(self, attempts: Iterable[tuple[AdapterFile, Path | dict[str, Tensor]]]) -> str:
        """Name of the first attempt that the model has completely. Raises the last attempt's AdapterFileError."""
        errors: list[AdapterFileError] = []
        for contents, source in attempts:
            name = f"adapter_{self._num_loaded}"
            self._num_loaded += 1
            try:
                self._load_as(name, source)
                if name not in chain.from_iterable(self._pipeline.get_list_adapters().values()):
                    raise AdapterFileError("none of its weights has a layer here")
                if missing := unplaced_keys(contents, self._models().values(), name):
                    raise AdapterFileError(_say_unplaced(missing))
                return name
            except AdapterFileError as error:
                self._delete(name)
                errors.append(error)
        raise errors[-1]

    def _load_as(self, name: str, source: Path | dict[str, Tensor]) -> None:
        """Load under a name. Raises AdapterFileError for any error of diffusers and peft."""
        where: dict[str, Any] = {"pretrained_model_name_or_path_or_dict": source}
        if isinstance(source, Path):
            where = {"pretrained_model_name_or_path_or_dict": str(source.parent), "weight_name": source.name}
        try:
            with without_progress_bars(), _without_expected_warnings():
                self._pipeline.load_lora_weights(
                    **where, adapter_name=name, use_safetensors=True, local_files_only=True
                )
        except Exception as error:  # a file may hold anything, and the libraries raise many classes
            # The cleanup in diffusers may fail and hide the reason.
            reason = error.__context__ if isinstance(error, KeyError) and error.__context__ else error
            raise AdapterFileError(str(reason)) from error

    def _models(self) -> dict[str, nn.Module]:
        components = self._pipeline.components.items()
        return {name: component for name, component in components if isinstance(component, nn.Module)}

    def _check(self, contents: AdapterFile) -> None:
        """Raise AdapterFileError for weights that would replace or widen the model's own, and for unused alphas."""
        layers = {
            f"{component}.{layer}": module
            for component, model in self._models().items()
            for layer, module in model.named_modules()
        }
        for key, weight in contents.weights.items():
            if not any(mark in key for mark in MARKS):
                raise AdapterFileError(f"{key} is no part of an adapter")
            inputs = getattr(layers.get(key.removesuffix(DOWN)), "in_features", None)
            if key.endswith(DOWN) and inputs is not None and list(weight.shape[1:2]) != [inputs]:
                raise AdapterFileError(f"{key} has the shape {list(weight.shape)}, its layer has {inputs} inputs")
        if unused := contents.unused_alphas():
            raise AdapterFileError(_say_unplaced(unused))

    def _delete(self, name: str) -> None:
        with _without_expected_warnings():
            self._pipeline.delete_adapters(name)
        self._deactivate()

    def _deactivate(self) -> None:
        """Deactivate all adapters: after a load or delete, layers may have different ones active."""
        self._pipeline.disable_lora()
        self._active = {}


@contextmanager
def _without_expected_warnings() -> Iterator[None]:
    """Ignore warnings about intended effects, and about errors that are checked afterwards."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute in the model")
        warnings.filterwarnings("ignore", message=".*was active which is now deleted")
        warnings.filterwarnings("ignore", message="The following alpha_pattern keys did not match any targeted module")
        yield


def _say_unplaced(keys: Sequence[str]) -> str:
    return f"no layer here takes these of its weights with their alphas: {listed(keys)}"
