"""Names that a request may give as its `model`: those of the served model, and those of its adapters."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_omni.diffusion.control.adapter_registry import AdapterRegistry
from vllm_omni.errors import ModelNotFoundError
from vllm_omni.inputs.adapter_names import listed
from vllm_omni.inputs.adapters import ServedAdapter

_MAX_ECHO = 64


@dataclass(frozen=True)
class ServedNames:
    """The names. One of the model hides an adapter with the same name, such as a file of a `--lora-dir` folder."""

    models: tuple[str, ...]
    """Names of the model; the first one is the parent of all adapters."""
    registry: AdapterRegistry

    def adapters(self) -> tuple[ServedAdapter, ...]:
        """Adapters that requests may name."""
        return tuple(adapter for adapter in self.registry if adapter.name not in self.models)

    def adapter(self, name: str | None) -> ServedAdapter | None:
        """Adapter of this name; None: there is none, or the model has the name."""
        return None if name is None or name in self.models else self.registry.get(name)

    def check(self, model: str | None) -> None:
        """Raise ModelNotFoundError unless `model` is absent or a name of the model or of an adapter."""
        if model is None or model in self.models or model in self.registry:
            return
        served = (*self.models, *(adapter.name for adapter in self.adapters()))
        raise ModelNotFoundError(
            f"The model {model[:_MAX_ECHO]!r} does not exist; served: {listed(served)}", param="model"
        )
