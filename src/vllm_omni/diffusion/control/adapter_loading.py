"""Loading and unloading of served adapters while the engine runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.control.adapter_registry import AdapterRegistry
from vllm_omni.diffusion.control.adapters import file_at
from vllm_omni.diffusion.control.resident_adapters import ResidentAdapters
from vllm_omni.diffusion.messages.adapters import AdapterKey
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.errors import ConfigError, InvalidRequestError, RequestError, WorkerDiedError
from vllm_omni.inputs.adapters import AdapterState, AdapterStats, ServedAdapter
from vllm_omni.inputs.data import LoRARequest

MAX_LOADED = 10_000
"""Most names that loads have added: clients cannot let the registry grow without end."""
STATES: tuple[AdapterState, ...] = ("device", "host", "disk")


class AdapterEngine(Protocol):
    """Part of an engine that loads adapters: of `DiffusionEngine` and of `Replicas`."""

    async def load_adapter(self, key: AdapterKey) -> None: ...

    async def wait_for_ends(self, is_meant: Callable[[DiffusionRequest], bool]) -> None: ...

    def forget_adapters(self, is_forgotten: Callable[[AdapterKey], bool]) -> None: ...

    @property
    def resident_adapters(self) -> Sequence[ResidentAdapters]: ...


class AdapterLoading:
    """Changes the registry of one engine. All calls come from the engine's event loop."""

    def __init__(
        self, adapters: AdapterRegistry, info: ModelInfo, engine: AdapterEngine, kept: Collection[str] = ()
    ) -> None:
        """kept: names that are not unloaded, because requests that name no adapter need them."""
        self._adapters = adapters
        self._kept = kept
        self._info = info
        self._engine = engine
        self._loading: set[str] = set()
        """Names whose load is under way."""

    async def load_served(self) -> None:
        """Read the adapters that are served from the start.

        Raises ConfigError for one that the model does not take, and WorkerDiedError for any other failure to read it.
        """
        for adapter in self._adapters:
            if adapter.source == "start":
                try:
                    await self._engine.load_adapter(self._key_of(adapter.file))
                except InvalidRequestError as error:
                    raise ConfigError(f"--lora-modules {adapter.name}: {error}") from error
                except RequestError as error:
                    raise WorkerDiedError(f"the adapter {adapter.name} was not read at start: {error}") from error

    async def load(self, request: LoRARequest, defaults: Mapping[str, Any], replace: bool) -> None:
        """Serve the adapter of `request`, which has a path, when every rank of every replica has read and checked it.

        defaults: of `check_loaded_recipe`. replace: whether it takes the
        place of a served adapter with its name; requests that run keep that one.
        Raises InvalidRequestError, and changes nothing, for a name that is served or being loaded, and for a file that
        the model does not take; AdapterChangedError for one that is written meanwhile.
        """
        if self._info.why_no_adapters:
            raise InvalidRequestError(self._info.why_no_adapters, param="name")
        name = request.name
        if request.path is None:
            raise InvalidRequestError(f"load_lora {name!r} needs a path", param="path")
        self._adapters.check_free(name, replace)
        if name not in self._adapters.given and self._adapters.num_loaded + len(self._loading) >= MAX_LOADED:
            raise InvalidRequestError(
                f"{MAX_LOADED} loaded LoRA adapters are served, no more are taken: unload some", param="name"
            )
        if name in self._loading:
            raise InvalidRequestError(f"the LoRA adapter {name!r} is being loaded", param="name")
        file = file_at(request.path, "path")
        self._loading.add(name)
        try:
            await self._engine.load_adapter(key := self._key_of(file))
        except BaseException:  # also after a cancellation, nothing of the load may stay
            if all(adapter.file != file for adapter in self._adapters):
                self._engine.forget_adapters(lambda each: each == key)  # some replicas may have read it
            raise
        finally:
            self._loading.discard(name)
        self._adapters.put(ServedAdapter(name, file, defaults, "loaded"), key.stamp)

    async def unload(self, name: str) -> None:
        """Stop serving an adapter: new requests are refused at once. Returns when the requests that use it have ended.

        An adapter of a folder leaves memory and stays listed. Raises InvalidRequestError for a name that is not served
        and for an adapter of the server's default parameters.
        """
        if name in self._kept and self._adapters.require(name, "name").source != "folder":
            raise InvalidRequestError(
                f"requests without an adapter get {name[:64]!r}, by --default-sampling-params: it stays", param="name"
            )
        file = self._adapters.remove(name).file
        await self._engine.wait_for_ends(lambda request: any(lora.name == name for lora in request.loras))
        if not any(adapter.file == file for adapter in self._adapters if adapter.source != "folder"):
            self._engine.forget_adapters(lambda key: key.file == file)

    def states(self) -> dict[str, AdapterState]:
        """State of each served adapter, by name: the fastest that it has on any replica."""
        resident = self._engine.resident_adapters
        return {
            adapter.name: min(
                (its.state(self._key_of(adapter.file)) for its in resident), key=STATES.index, default="disk"
            )
            for adapter in self._adapters
        }

    def stats(self) -> AdapterStats:
        resident = self._engine.resident_adapters
        states = Counter(self.states().values())
        return AdapterStats(
            {state: states[state] for state in STATES},
            sum(its.num_loads for its in resident),
            sum(its.num_evictions for its in resident),
            sum(its.load_seconds for its in resident),
        )

    def _key_of(self, file: str) -> AdapterKey:
        return AdapterKey(file, self._adapters.stamp(file))
