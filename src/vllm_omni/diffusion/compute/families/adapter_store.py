"""Loaded adapters of a packed family's model.

The ranks of a replica keep the same adapters, because they exchange tensors when they compute rows of modulation. So
the store changes only for requests that all ranks run: `check` reads files before the ranks agree, `admit` follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_omni.diffusion.compute.device.failures import is_out_of_memory
from vllm_omni.diffusion.compute.families.component_loader import ComponentLoader
from vllm_omni.diffusion.compute.step.adapters import Composition, LoadedAdapter
from vllm_omni.diffusion.compute.step.transformer import PackedTransformer
from vllm_omni.diffusion.compute.weights.adapter_file import AdapterFileError
from vllm_omni.diffusion.compute.weights.adapter_layers import AdapterReader, diffusers_conversion
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.errors import ConfigError, InvalidRequestError, to_one_line
from vllm_omni.inputs.adapter_files import served_files

MAX_UNSERVED = 8
"""Adapters kept besides the served ones, for requests that give paths; there may be more while as many are in use."""


class AdapterStore:
    """Loads adapters, the served ones at start and others when a request first names them."""

    def __init__(
        self,
        loader: ComponentLoader,
        transformers: Sequence[PackedTransformer],
        converter: str,
        on_drop: Callable[[LoadedAdapter], object],
    ) -> None:
        """converter: see `FlowPipeline.adapter_converter`. on_drop: called with each adapter that is dropped; no
        request uses it.

        Raises ConfigError for a served adapter that is gone, does not fit the model or does not fit into memory.
        """
        convert = diffusers_conversion(converter) if converter else None
        self._reader = AdapterReader(transformers, convert, loader.dtype, loader.device)
        self._on_drop = on_drop
        self._loaded: dict[str, LoadedAdapter] = {}
        """By file, least recently used first; the same on all ranks."""
        self._checked: dict[str, dict[str, LoadedAdapter]] = {}
        """Adapters by file of each request that is checked and not admitted, by its id. Ranks may differ."""
        self._in_use: dict[str, Composition] = {}
        """Adapters of each request that is admitted and not released, by its id; the same on all ranks."""
        # Files may be gone since the server started, when a worker starts again.
        self._served = frozenset(served_files(loader.config.lora_modules).values())
        for file in sorted(self._served):
            self._loaded[file] = self._read_served(file)

    def check(self, request: DiffusionRequest) -> None:
        """Read the adapters of the request that are not loaded, for `admit`. Raises InvalidRequestError."""
        self._checked[request.request_id] = {lora.path: self._found_or_read(lora.path) for lora in request.loras}

    def admit(self, request: DiffusionRequest) -> None:
        """Keep the adapters of a checked request until `release`. All ranks admit the same requests in order."""
        checked = self._checked.pop(request.request_id)
        for file, adapter in checked.items():
            self._loaded[file] = self._loaded.pop(file, adapter)
        self._in_use[request.request_id] = tuple((self._loaded[lora.path], lora.scale) for lora in request.loras)
        self._drop_idle(MAX_UNSERVED)

    def composition(self, request: DiffusionRequest) -> Composition:
        """Adapters of the request with their scales; a request with adapters must be admitted."""
        return self._in_use[request.request_id] if request.loras else ()

    def release(self, request_id: str) -> None:
        """End the use of its adapters by a request, which may be checked, admitted or neither."""
        self._checked.pop(request_id, None)
        if self._in_use.pop(request_id, None):
            self._drop_idle(MAX_UNSERVED)

    def release_memory(self) -> None:
        """Drop all adapters that are neither served nor in use."""
        self._drop_idle(0)

    def _drop_idle(self, most: int) -> None:
        """Drop the least recently used idle adapters while there are more than `most` besides the served ones."""
        in_use = {adapter for composition in self._in_use.values() for adapter, _ in composition}
        unserved = [file for file in self._loaded if file not in self._served]
        idle = [file for file in unserved if self._loaded[file] not in in_use]
        for file in idle[: max(len(unserved) - most, 0)]:
            self._on_drop(self._loaded.pop(file))

    def _found_or_read(self, file: str) -> LoadedAdapter:
        for adapters in (self._loaded, *self._checked.values()):
            if file in adapters:
                return adapters[file]
        return self._read(file)

    def _read_served(self, file: str) -> LoadedAdapter:
        try:
            return self._read(file)
        except InvalidRequestError as error:
            raise ConfigError(f"--lora-modules: {error}") from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(
                f"--lora-modules: the device has no memory left for {file}, the adapter {len(self._loaded) + 1} of "
                f"{len(self._served)}; give fewer adapters"
            ) from error

    def _read(self, file: str) -> LoadedAdapter:
        try:
            return self._reader.read(Path(file))
        except AdapterFileError as error:
            raise InvalidRequestError(
                f"the LoRA adapter {file} does not fit this model: {to_one_line(str(error))}", param="lora_request"
            ) from error
