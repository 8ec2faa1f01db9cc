"""Classes that model_index.json names; only those of diffusers and transformers are loaded."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import transformers

from vllm_omni.diffusion.catalog.folder_files import MODEL_INDEX, read_object
from vllm_omni.diffusion.catalog.model_index import read_components
from vllm_omni.errors import ConfigError

LIBRARIES = ("diffusers", "transformers")
LOADABLE = (
    diffusers.ConfigMixin,
    transformers.PreTrainedModel,
    transformers.PreTrainedTokenizerBase,
    transformers.FeatureExtractionMixin,
    transformers.ImageProcessingMixin,
    transformers.ProcessorMixin,
)
"""Base classes that load safetensors and JSON, and no code of the model (transformers' Auto classes might)."""
INDIRECT = (diffusers.AutoModel, diffusers.DiffusionPipeline)
"""Classes of diffusers that load a class named in a further file."""
NO_REMOTE_CODE = "code that comes with a model is never run, also not with --trust-remote-code"


def pipeline_class(path: Path) -> type[Any]:
    """diffusers' class of the pipeline in `path`. Raises ConfigError if diffusers has no such class."""
    name = read_object(path, MODEL_INDEX).get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise ConfigError(
            f"model_index.json names the pipeline {name!r}, which neither we nor diffusers {diffusers.__version__} has"
            f"; {NO_REMOTE_CODE}"
        )
    return cls


def component_classes(path: Path) -> dict[str, type[Any]]:
    """Class of each component. Raises ConfigError for other libraries, whose code would come with the model."""
    classes = {}
    for name, component in read_components(read_object(path, MODEL_INDEX)).items():
        library, class_name = component.library, component.class_name
        try:
            cls = getattr(_module_of(library), class_name, None)
        except (ImportError, RuntimeError):  # lazy imports: some classes need packages that are not installed
            cls = None
        if not inspect.isclass(cls) or not issubclass(cls, LOADABLE) or issubclass(cls, INDIRECT):
            raise ConfigError(
                f"model_index.json: {name} is {[library, class_name]}; only models, schedulers, tokenizers and "
                f"processors of diffusers and transformers are loaded; {NO_REMOTE_CODE}"
            )
        classes[name] = cls
    return classes


def _module_of(library: str) -> Any:
    """Module of diffusers or transformers; None for any other library."""
    if library in LIBRARIES:
        return import_module(library)
    pipelines = diffusers.pipelines
    module = getattr(pipelines, library, None)
    return module if inspect.ismodule(module) and module.__name__.startswith(f"{pipelines.__name__}.") else None
