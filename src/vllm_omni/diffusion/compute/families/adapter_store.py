"""Loaded adapters of a packed family's model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_omni.diffusion.compute.families.component_loader import ComponentLoader
from vllm_omni.diffusion.compute.step.adapters import Composition, LoadedAdapter
from vllm_omni.diffusion.compute.step.transformer import PackedTransformer
from vllm_omni.diffusion.compute.weights.adapter_file import AdapterFileError
from vllm_omni.diffusion.compute.weights.adapter_layers import AdapterReader, diffusers_conversion
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.errors import ConfigError, InvalidRequestError, to_one_line
from vllm_omni.inputs.adapter_files import adapter_file

MAX_UNSERVED = 8
"""Adapters kept besides the served ones, for requests that give paths. Running requests keep theirs in any case."""


class AdapterStore:
    """Loads adapters, the served ones at start and others when a request first names them."""

    def __init__(
        self,
        loader: ComponentLoader,
        transformers: Sequence[PackedTransformer],
        converter: str,
        on_drop: Callable[[LoadedAdapter], object],
    ) -> None:
        """converter: see `FlowPipeline.adapter_converter`. on_drop: called with each adapter that is dropped, maybe
        again after a request that used it has ended.

        Raises ConfigError for a served adapter that does not fit the model.
        """
        convert = diffusers_conversion(converter) if converter else None
        self._reader = AdapterReader(transformers, convert, loader.dtype, loader.device)
        self._on_drop = on_drop
        self._loaded: dict[str, LoadedAdapter] = {}
        """By file, least recently used first."""
        self._served = frozenset(str(adapter_file(path)) for path in loader.config.lora_modules.values())
        for file in sorted(self._served):
            try:
                self._load(file)
            except InvalidRequestError as error:
                raise ConfigError(f"--lora-modules: {error}") from error

    def composition(self, request: DiffusionRequest) -> Composition:
        """Adapters of the request with their scales; loads what is missing. Raises InvalidRequestError."""
        return tuple((self._adapter(lora.path), lora.scale) for lora in request.loras)

    def release(self, composition: Composition) -> None:
        """Drop adapters of a request that has ended which were dropped from the store while it ran."""
        for adapter, _ in composition:
            if adapter not in self._loaded.values():
                self._on_drop(adapter)

    def _adapter(self, file: str) -> LoadedAdapter:
        if file not in self._loaded:
            self._load(file)
            unserved = [name for name in self._loaded if name not in self._served]
            if len(unserved) > MAX_UNSERVED:
                self._on_drop(self._loaded.pop(unserved[0]))
        adapter = self._loaded[file] = self._loaded.pop(file)
        return adapter

    def _load(self, file: str) -> None:
        try:
            self._loaded[file] = self._reader.read(Path(file))
        except AdapterFileError as error:
            raise InvalidRequestError(
                f"the LoRA adapter {file} does not fit this model: {to_one_line(str(error))}", param="lora_request"
            ) from error
