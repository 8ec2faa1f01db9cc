"""Loaded adapters of a packed family's model: copies in host memory, and those on the device.

The ranks of a replica keep rows of modulation of the same adapters, because they exchange tensors when they compute
them. So what is on the device changes only for requests that all ranks run (`check` copies before the ranks agree,
`admit` follows) and by plans (`drop`), which all ranks execute alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from vllm_omni.diffusion.compute.device.transfers import HOST
from vllm_omni.diffusion.compute.families.component_loader import ComponentLoader
from vllm_omni.diffusion.compute.layers.fp8 import Fp8ColumnLinear
from vllm_omni.diffusion.compute.step.adapters import Composition, LoadedAdapter
from vllm_omni.diffusion.compute.step.transformer import PackedTransformer
from vllm_omni.diffusion.compute.weights.adapter_layers import AdapterReader, diffusers_conversion
from vllm_omni.diffusion.compute.weights.adapter_read import read_unchanged
from vllm_omni.diffusion.messages.adapters import AdapterKey, KeptFiles
from vllm_omni.diffusion.messages.request import DiffusionRequest


class AdapterStore:
    """Adapters of one rank. The engine decides which are read and dropped; `read` and `forget` are for any thread."""

    def __init__(
        self,
        loader: ComponentLoader,
        transformers: Sequence[PackedTransformer],
        converter: str,
        on_drop: Callable[[LoadedAdapter], object],
    ) -> None:
        """converter: see `FlowPipeline.adapter_converter`. on_drop: called with each adapter that leaves the device; no
        request uses it."""
        convert = diffusers_conversion(converter) if converter else None
        self._reader = AdapterReader(transformers, convert, loader.dtype, HOST)
        self._device = loader.device
        config = loader.config
        if config.lora_modules or config.lora_dirs or config.enable_lora_loading:
            is_float8 = any(isinstance(layer, Fp8ColumnLinear) for each in transformers for layer in each.modules())
            transformers[0].kernels.compile_changes(loader.dtype, is_float8, loader.device)
        self._on_drop = on_drop
        self._host: dict[AdapterKey, LoadedAdapter] = {}
        self._host_lock = threading.Lock()
        """Held for changes of `_host`, never while a file is read."""
        self._loaded: dict[AdapterKey, LoadedAdapter] = {}
        """Adapters on the device; the same on all ranks."""
        self._checked: dict[str, dict[AdapterKey, LoadedAdapter]] = {}
        """Adapters of each request that is checked and not admitted, by its id. Ranks may differ."""
        self._in_use: dict[str, Composition] = {}
        """Adapters of each request that is admitted and not released, by its id; the same on all ranks."""

    def read(self, key: AdapterKey, kept: KeptFiles | None = None) -> int:
        """Read an adapter into host memory; kept: see `Pipeline.read_adapter`. Returns the bytes of its weights on
        this rank.

        Raises InvalidRequestError for a file that the model does not take, AdapterChangedError for one that has changed
        since it was named.
        """
        return self._read(key, kept).num_bytes

    def forget(self, keys: Iterable[AdapterKey]) -> None:
        """Drop adapters from host memory."""
        with self._host_lock:
            for key in keys:
                self._host.pop(key, None)

    def check(self, request: DiffusionRequest) -> None:
        """Copy adapters of the request that are not on the device, for `admit`.

        Raises as `read` for those that are not in host memory either: a runner without an engine reads them here.
        """
        self._checked[request.request_id] = {lora.key: self._found_or_copied(lora.key) for lora in request.loras}

    def admit(self, request: DiffusionRequest) -> None:
        """Keep the adapters of a checked request until `release`. All ranks admit the same requests in order."""
        for key, adapter in self._checked.pop(request.request_id).items():
            self._loaded.setdefault(key, adapter)
        self._in_use[request.request_id] = tuple((self._loaded[lora.key], lora.scale) for lora in request.loras)

    def composition(self, request: DiffusionRequest) -> Composition:
        """Adapters of the request with their scales; a request with adapters must be admitted."""
        return self._in_use[request.request_id] if request.loras else ()

    def release(self, request_id: str) -> None:
        """End the use of its adapters by a request, which may be checked, admitted or neither."""
        self._checked.pop(request_id, None)
        self._in_use.pop(request_id, None)

    def drop(self, keys: Iterable[AdapterKey]) -> None:
        """Drop adapters that are on the device and not in use from there."""
        in_use = {adapter for composition in self._in_use.values() for adapter, _ in composition}
        for key in keys:
            if key in self._loaded and self._loaded[key] not in in_use:
                self._on_drop(self._loaded.pop(key))

    def release_memory(self) -> None:
        """Drop all idle adapters from the device; `check` copies them again."""
        self.drop(list(self._loaded))

    def clear(self) -> None:
        """Drop all adapters from the device and from host memory. No request uses them."""
        self.release_memory()
        with self._host_lock:
            self._host.clear()

    def _found_or_copied(self, key: AdapterKey) -> LoadedAdapter:
        for adapters in (self._loaded, *self._checked.values()):
            if key in adapters:
                return adapters[key]
        with self._host_lock:
            adapter = self._host.get(key)
        return (adapter or self._read(key)).to(self._device)

    def _read(self, key: AdapterKey, kept: KeptFiles | None = None) -> LoadedAdapter:
        adapter = read_unchanged(key, self._reader.read, kept)
        with self._host_lock:
            self._host[key] = adapter
        return adapter
