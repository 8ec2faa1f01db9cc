"""What model_index.json names: nothing but classes of diffusers and transformers is loaded (no torch at import)."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.models.configs import read_config
from vllm_omni.errors import ConfigError

LIBRARIES = ("diffusers", "transformers")
NO_REMOTE_CODE = "code that comes with a model is never run, also not with --trust-remote-code"


def pipeline_class(path: Path) -> type[Any]:
    """diffusers' class of the pipeline in `path`. Raises ConfigError when diffusers has none of that name."""
    import diffusers

    name = read_config(path, "", "model_index.json").get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise ConfigError(
            f"model_index.json names the pipeline {name!r}, which neither we nor diffusers {diffusers.__version__} has"
            f"; {NO_REMOTE_CODE}"
        )
    return cls


def component_classes(path: Path) -> dict[str, type[Any]]:
    """Component -> its class, of those that the model has.

    Raises ConfigError for a component of another library: loading it would run code that is not diffusers' own.
    """
    index = read_config(path, "", "model_index.json")
    named = {name: value for name, value in index.items() if isinstance(value, list)}
    return {name: _class_of(name, value) for name, value in named.items() if any(part is not None for part in value)}


def _class_of(component: str, named: list[Any]) -> type[Any]:
    """`named`: a library, or a module of diffusers' pipelines, and a class in it."""
    if len(named) == 2 and all(isinstance(part, str) and part.isidentifier() for part in named):
        cls = getattr(_module_of(named[0]), named[1], None)
        if inspect.isclass(cls) and issubclass(cls, _loadable()):
            return cls
    raise ConfigError(
        f"model_index.json: {component} is {named!r}; only models, schedulers, tokenizers and processors of diffusers "
        f"and transformers are loaded; {NO_REMOTE_CODE}"
    )


def _module_of(library: str) -> Any:
    """None for what is no module of diffusers or transformers."""
    from diffusers import pipelines

    if library in LIBRARIES:
        return import_module(library)
    module = getattr(pipelines, library, None)
    return module if inspect.ismodule(module) and module.__name__.startswith(f"{pipelines.__name__}.") else None


def _loadable() -> tuple[type[Any], ...]:
    """What loads safetensors and JSON, and no code that lies beside them (transformers' Auto classes might)."""
    import diffusers
    import transformers

    return (
        diffusers.ConfigMixin,
        transformers.PreTrainedModel,
        transformers.PreTrainedTokenizerBase,
        transformers.FeatureExtractionMixin,
        transformers.ImageProcessingMixin,
        transformers.ProcessorMixin,
    )
