"""LoRA adapters in the models of a whole pipeline, by diffusers and peft: those of one request are active."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
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
from vllm_omni.diffusion.compute.weights.adapter_read import read_unchanged
from vllm_omni.diffusion.messages.adapters import AdapterKey, KeptFiles
from vllm_omni.diffusion.messages.request import LoRA
from vllm_omni.errors import error_line
from vllm_omni.inputs.adapter_files import AdapterPaths

logger = logging.getLogger(__name__)

MARKS = ("lora", "lokr", "alpha")
"""Parts of names: an adapter's weight has one of them. Other weights would replace the model's own."""
SUFFIX = ".safetensors"
DOWN = ".lora_A.weight"
"""End of the name of a weight [rank, inputs of the layer]."""


class Adapters:
    """Loads adapters and switches between them; the model's own weights do not change."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._names: dict[AdapterKey, str] = {}
        """Loaded adapter -> its name in diffusers."""
        self._kept: dict[AdapterKey, KeptFiles] = {}
        """Open files of adapters that were read and not forgotten; they are loaded from there."""
        self._undeleted: dict[str, None] = {}
        """Names of adapters whose deletion failed."""
        self._num_loaded = 0
        self._active: dict[str, float] | None = {}
        """Scales of the active adapters, by their names in diffusers; None: unknown, after an error."""

    def use(self, loras: Sequence[LoRA]) -> None:
        """Activate these adapters alone, whose changes add up; load those that are missing.

        Raises InvalidRequestError.
        """
        for lora in loras:
            self.load(lora.key)
        wanted = {self._names[lora.key]: lora.scale for lora in loras}
        if wanted == self._active:
            return
        self._active = None
        if wanted:
            self._pipeline.enable_lora()
            self._pipeline.set_adapters(list(wanted), list(wanted.values()))
        else:
            self._pipeline.disable_lora()
        self._active = wanted

    def drop(self, keys: Iterable[AdapterKey]) -> None:
        """Delete those of these adapters that are loaded. No request uses them. Raises nothing: see `_delete`."""
        for undeleted in list(self._undeleted):
            self._delete(undeleted)
        for key in keys:
            if (name := self._names.pop(key, None)) is not None:
                self._delete(name)

    def drop_all_but(self, in_use: Collection[AdapterKey]) -> None:
        """Delete all adapters that no request uses."""
        self.drop([key for key in self._names if key not in in_use])

    def load(self, key: AdapterKey) -> None:
        """Load an adapter unless it is loaded. Raises InvalidRequestError if the model lacks some of its weights at
        their scale."""
        if key not in self._names:
            self._names[key] = self._load(key)

    def forget(self, keys: Iterable[AdapterKey]) -> None:
        """Load these adapters no more from their open files. Any thread may call this."""
        for key in keys:
            self._kept.pop(key, None)

    def read(self, key: AdapterKey, kept: KeptFiles | None = None) -> int:
        """Read and check a file by itself, in any thread. Returns the bytes of its weights.

        Raises InvalidRequestError and AdapterChangedError.
        """
        contents = read_unchanged(key, AdapterFile.read, kept)
        if kept is not None:
            self._kept[key] = kept
        return sum(weight.nbytes for weight in contents.weights.values())

    def _load(self, key: AdapterKey) -> str:
        """Load a file. Returns its name in diffusers.

        diffusers drops some keys or their alphas: then the weights are scaled here, renamed to the model's own layers
        where these are found, and loaded again.
        """
        name = read_unchanged(key, self._load_file, self._kept.get(key))
        self._deactivate()
        return name

    def _load_file(self, paths: AdapterPaths) -> str:
        contents = AdapterFile.read(paths)
        self._check(contents)
        with _named_file(paths.weights) as file:
            return self._load_first(self._attempts(contents, file))

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
        """Delete an adapter. One that the libraries do not delete costs memory alone, until a later try: `use`
        activates only the adapters of its request."""
        self._active = None
        self._undeleted[name] = None
        try:
            with _without_expected_warnings():
                self._pipeline.delete_adapters(name)
            self._deactivate()
        except Exception as error:  # the libraries raise many classes
            logger.warning("an idle LoRA adapter is not deleted yet: %s", error_line(error))
        else:
            del self._undeleted[name]

    def _deactivate(self) -> None:
        """Deactivate all adapters: after a load or delete, layers may have different ones active."""
        self._pipeline.disable_lora()
        self._active = {}


@contextmanager
def _named_file(file: Path) -> Iterator[Path]:
    """Path of the file for diffusers, which takes a file without this ending for a pickle."""
    if file.suffix == SUFFIX:
        yield file
        return
    with TemporaryDirectory(prefix="vllm-omni-adapter-") as folder:
        (link := Path(folder, f"adapter{SUFFIX}")).symlink_to(file)
        yield link


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
