"""Table of the families, and the facts of the model that a name stands for. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.catalog.find_folder import find_folder
from vllm_omni.diffusion.catalog.folder_files import MODEL_INDEX, read_object
from vllm_omni.diffusion.catalog.hub import DEFAULT_ACCESS, HubAccess, hub_reason
from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.data import LoadFormat
from vllm_omni.errors import ConfigError

PACKAGE = "vllm_omni.diffusion.compute.families"
FAMILIES: dict[str, str] = {
    "QwenImagePipeline": "qwen_image",
    "QwenImageEditPipeline": "qwen_image",
    "QwenImageEditPlusPipeline": "qwen_image",
    "ZImagePipeline": "z_image",
    "WanPipeline": "wan",
    "WanImageToVideoPipeline": "wan",
}
"""`_class_name` in model_index.json -> family, a package under `PACKAGE`. Its `info.py` has `describe(path)`, which
returns a `ModelInfo` and imports no torch; its `pipeline.py` has the class that `PIPELINES` names."""
FALLBACK_FAMILY = "diffusers_fallback"
"""Family of every other class."""
PIPELINES: dict[str, str] = {
    "qwen_image": "QwenImagePipeline",
    "z_image": "ZImagePipeline",
    "wan": "WanPipeline",
    FALLBACK_FAMILY: "DiffusersPipeline",
}
"""Family -> class in its `pipeline.py`, a subclass of `step.pipeline.Pipeline`."""


def load_model_info(
    model: str,
    load_format: LoadFormat = "auto",
    access: HubAccess = DEFAULT_ACCESS,
    check: Callable[[ModelInfo], object] = lambda info: None,
) -> ModelInfo:
    """Find the folder and family of `model`.

    check: raises ConfigError for settings that the model does not take. Raises ConfigError for a pipeline class that
    nothing here serves. Weights of a hub model are downloaded only after both.
    """
    folder = find_folder(model, load_format, access, lambda path: check(_describe(path)))
    with hub_reason(*folder):
        info = _describe(folder.path)
    check(info)
    return replace(info, hub_failure=folder.hub_failure)


def _describe(path: Path) -> ModelInfo:
    module = import_module(f"{PACKAGE}.{family_of(path)}.info")
    info: ModelInfo = module.describe(path)
    return info


def pipeline_class(family: str) -> Any:
    """Class that loads and runs the models of a family. Imports torch."""
    return getattr(import_module(f"{PACKAGE}.{family}.pipeline"), PIPELINES[family])


def family_of(path: Path) -> str:
    """Family that serves the model folder `path`.

    Raises ConfigError where model_index.json names no pipeline class.
    """
    class_name = read_object(path, MODEL_INDEX).get("_class_name")
    if class_name is None:
        raise ConfigError(f"model {str(path)!r}: model_index.json names no _class_name")
    return FAMILIES.get(class_name, FALLBACK_FAMILY) if isinstance(class_name, str) else FALLBACK_FAMILY
