"""Components in a model_index.json: their libraries, classes and kinds. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_omni.diffusion.catalog.folder_files import MODEL_INDEX
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.field_values import shown

Stems = tuple[str, ...]
"""Names of weight files, without variant and suffix, that a component may be read from."""
DIFFUSERS_STEMS: Stems = ("diffusion_pytorch_model",)
TRANSFORMERS_STEMS: Stems = ("model",)
STEMS = DIFFUSERS_STEMS + TRANSFORMERS_STEMS

Kind = Literal["tokenizer", "scheduler", "guider", "processor"]
_KINDS: dict[Kind, re.Pattern[str]] = {
    "tokenizer": re.compile("(?<!Audio)Tokenizer|Backend$"),  # an AudioTokenizer is a model that encodes sound
    "scheduler": re.compile("Scheduler"),
    "guider": re.compile("Guidance"),
    "processor": re.compile("Processor|Extractor"),
}


@dataclass(frozen=True)
class Component:
    """Entry of a component in model_index.json."""

    library: str
    """diffusers, transformers, or a module of diffusers' pipelines, such as stable_diffusion."""
    class_name: str

    @property
    def kind(self) -> Kind | None:
        """Kind of a component without weights, from the name of its class; None: the name tells no kind."""
        if self.class_name.endswith("Model"):
            return None
        return next((kind for kind, words in _KINDS.items() if words.search(self.class_name)), None)

    @property
    def stems(self) -> Stems:
        """Stems of the files that the library reads; both, for modules of pipelines with classes of either library."""
        known = {"diffusers": DIFFUSERS_STEMS, "transformers": TRANSFORMERS_STEMS}
        return known.get(self.library, STEMS)


def read_components(index: Mapping[str, Any]) -> dict[str, Component]:
    """Components by name, from the JSON of model_index.json. Raises ConfigError for a malformed entry."""
    components = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or all(part is None for part in value):
            continue  # a setting of diffusers or of the pipeline, or a component that the model does without
        if len(value) != 2 or not all(isinstance(part, str) for part in value):
            raise ConfigError(f"{MODEL_INDEX}: {name} must be a list of a library and a class, got {shown(value)}")
        if name != Path(name).name or name in (".", ".."):
            raise ConfigError(f"{MODEL_INDEX} names {name!r}, which is not a folder of the model")
        components[name] = Component(*value)
    return components
