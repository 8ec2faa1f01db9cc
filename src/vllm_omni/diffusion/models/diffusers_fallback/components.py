"""What model_index.json names, and that it is nothing but diffusers' and transformers' own classes (no torch at import)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.models.configs import read_config
from vllm_omni.errors import ConfigError

LIBRARIES = ("diffusers", "transformers")


def pipeline_class(path: Path) -> type[Any]:
    """diffusers' class of the pipeline in `path`. Raises ConfigError when diffusers has none of that name."""
    import diffusers

    name = read_config(path, "", "model_index.json").get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise ConfigError(
            f"model_index.json names the pipeline {name!r}, which neither we nor diffusers {diffusers.__version__} has"
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
        library, class_name = named
        module = import_module(library) if library in LIBRARIES else _pipeline_modules().get(library)
        if inspect.isclass(cls := getattr(module, class_name, None)):
            return cls
    raise ConfigError(
        f"model_index.json: {component} is {named!r}; only classes of diffusers and transformers are loaded"
    )


def _pipeline_modules() -> Mapping[str, Any]:
    from diffusers import pipelines

    return {name: getattr(pipelines, name) for name in dir(pipelines) if inspect.ismodule(getattr(pipelines, name))}
