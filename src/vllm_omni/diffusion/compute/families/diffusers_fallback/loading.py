"""Loading of a whole pipeline; weights that are missing are an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from vllm_omni.diffusion.catalog.expected_weights import check_none_missing
from vllm_omni.diffusion.catalog.folder_files import MODEL_INDEX, names_in, read_object
from vllm_omni.diffusion.catalog.model_index import Stems, read_components
from vllm_omni.diffusion.catalog.weight_files import component_variant, has_weights, stored_weights
from vllm_omni.diffusion.compute.families.diffusers_fallback.components import component_classes
from vllm_omni.diffusion.compute.weights.stored_shapes import check_stored_shapes
from vllm_omni.errors import ConfigError, error_line

LOGGING = (diffusers.utils.logging, transformers.utils.logging)


def load_pipeline(path: Path, class_name: str, dtype: torch.dtype, variant: str | None) -> Any:
    """diffusers' pipeline in the model folder `path`, on the CPU. Raises ConfigError with the component."""
    common = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    classes = component_classes(path)
    components = read_components(read_object(path, MODEL_INDEX))
    with without_progress_bars(), _quiet_reports():
        models = {
            name: _load_model(path / name, classes[name], component.stems, variant, common)
            for name, component in components.items()
            if has_weights(component, names_in(path, name))
        }
        try:
            return diffusers.DiffusionPipeline.from_pretrained(
                path, variant=variant, trust_remote_code=False, **common, **models
            )
        except Exception as error:  # wrong values in a config raise errors of any class
            raise ConfigError(f"{path}: diffusers cannot load the {class_name}: {error_line(error)}") from error


def _load_model(folder: Path, cls: type[Any], stems: Stems, variant: str | None, common: dict[str, Any]) -> Any:
    stored = stored_weights(folder, variant, stems)  # names missing files more clearly than the libraries do
    check_stored_shapes(cls, folder, stored)
    variant = component_variant(folder, variant, stems)
    if issubclass(cls, transformers.PreTrainedModel):
        common = {**common, "ignore_mismatched_sizes": True}  # otherwise only the log names these weights
    try:
        model, differences = cls.from_pretrained(folder, variant=variant, output_loading_info=True, **common)
    except Exception as error:  # as above
        raise ConfigError(f"{folder.name}/: the {cls.__name__} cannot be loaded: {error_line(error)}") from error
    for name, held, expected in differences["mismatched_keys"]:
        raise ConfigError(f"{folder.name}/: {name} has shape {tuple(held)}, by config.json it is {tuple(expected)}")
    # The libraries initialize missing weights randomly, with no more than a line in the log.
    check_none_missing(folder.name, sorted(differences["missing_keys"]), cls.__name__)
    return model


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide the libraries' bars while weights load: one bar of ours counts all weights."""
    libraries = [library for library in LOGGING if library.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


@contextmanager
def _quiet_reports() -> Iterator[None]:
    """Keep the libraries' tables of differing weights out of the log: our error is one line."""
    levels = [library.get_verbosity() for library in LOGGING]
    for library in LOGGING:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(LOGGING, levels):
            library.set_verbosity(level)
