"""Loading and unloading of served adapters while the engine runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.control.adapter_registry import AdapterRegistry
from vllm_omni.diffusion.control.adapters import file_at
from vllm_omni.diffusion.data import fit_adapter_defaults
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.inputs.adapters import AdapterStats, ServedAdapter
from vllm_omni.inputs.data import LoRARequest


class AdapterLoading:
    """Changes the registry of one engine. All calls come from the engine's event loop."""

    def __init__(self, adapters: AdapterRegistry, info: ModelInfo) -> None:
        self._adapters = adapters
        self._info = info

    async def load(self, request: LoRARequest, defaults: Mapping[str, Any] | None, replace: bool) -> None:
        """Serve the adapter of `request`, which has a path, when every rank of every replica has read and checked it.

        defaults: sampling parameters of requests that name it and do not give them. replace: whether it takes the
        place of a served adapter with its name; requests that run keep that one.
        Raises InvalidRequestError, and changes nothing, for a name that is served and a file that the model does not
        take.
        """
        if self._info.why_no_adapters:
            raise InvalidRequestError(self._info.why_no_adapters, param="name")
        if request.path is None:
            raise InvalidRequestError(f"load_lora {request.name!r} needs a path", param="path")
        if not replace:
            self._adapters.check_free(request.name)
        try:
            fitted = fit_adapter_defaults(request.name, defaults or {}, "load_lora")
        except ConfigError as error:
            raise InvalidRequestError(str(error), param="defaults") from error
        self._adapters.put(ServedAdapter(request.name, file_at(request.path, "path"), fitted, "loaded"))

    async def unload(self, name: str) -> None:
        """Stop serving an adapter: new requests are refused at once. Returns when no request uses it any more.

        An adapter of a folder leaves memory and stays listed. Raises InvalidRequestError for a name that is not served.
        """
        self._adapters.remove(name)

    def stats(self) -> AdapterStats:
        return AdapterStats({"device": len(self._adapters), "host": 0, "disk": 0})
