"""Places of adapters in host memory and on the device of one replica: who waits for one, and which are dropped.

A request holds a place in host memory for each of its adapters from the time when there is room until its end, and a
slot on the device while it runs. Places are given by priority and then in the order of arrival, all of a request at
once, so requests that wait for each other's places cannot happen. Adapters that nobody holds stay until room is needed;
the least recently used one goes first. All ranks of the replica keep the same adapters.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from vllm_omni.diffusion.control.open_adapters import OpenAdapter, open_adapter
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.adapters import AdapterKey, AdapterRead, KeptFiles
from vllm_omni.diffusion.messages.item_error import ItemError
from vllm_omni.inputs.adapters import AdapterState

logger = logging.getLogger(__name__)

MAX_READS = 4
"""Most files that are read at the same time: each read holds the file in memory."""
MAX_DEATHS_OF_A_FILE = 2
"""A file is refused when so many workers died while they read it; the last time they read it alone."""


@dataclass(eq=False)
class _Adapter:
    """An adapter that is in host memory, or on its way there."""

    holders: set[str] = field(default_factory=set)
    """Requests that hold its place in host memory, by id."""
    users: set[str] = field(default_factory=set)
    """Requests that hold its slot on the device."""
    is_read: bool = False
    on_device: bool = False
    opened: OpenAdapter | None = None
    """Its files; None: they cannot be kept open."""
    num_bytes: int = 0


class ResidentAdapters:
    """Adapters of one replica, by key. Plain bookkeeping: the scheduler and the engine send what it asks for."""

    def __init__(self, config: OmniDiffusionConfig, device_bytes: int, loads_in_steps: bool = False) -> None:
        """device_bytes: bytes below which there may be more adapters on the device than slots, if `max_loras` is None.
        loads_in_steps: see `WorkerReady.loads_adapters_in_steps`.
        """
        self._loads_in_steps = loads_in_steps
        self._num_slots = config.num_device_loras
        self._device_bytes = 0 if config.max_loras is not None else device_bytes
        self._num_places = config.num_host_loras
        self._adapters: dict[AdapterKey, _Adapter] = {}
        """Least recently used first."""
        self._opened: dict[AdapterKey, OpenAdapter] = {}
        """Files of adapters that nobody held when workers died: a request may name one whose file is gone."""
        self._keys: dict[str, tuple[AdapterKey, ...]] = {}
        """Adapters of each request that waits for places or holds them, by id."""
        self._on_ready: dict[str, Callable[[str], object]] = {}
        self._waiting: dict[str, int] = {}
        """Priorities of the requests that wait for places, in the order of arrival."""
        self._to_read: dict[AdapterKey, None] = {}
        self._reading: set[AdapterKey] = set()
        self._loading: set[AdapterKey] = set()
        """Adapters that the model loads in plans without a result."""
        self._deaths: Counter[AdapterKey] = Counter()
        """Deaths of workers while they read a file that no worker has read since."""
        self._to_load: dict[AdapterKey, None] = {}
        self._to_drop: dict[AdapterKey, None] = {}
        self._to_forget: dict[AdapterKey, None] = {}
        self.num_loads = 0
        """Files read."""
        self.num_evictions = 0
        """Adapters dropped from the device or from host memory to make room."""
        self.load_seconds = 0.0
        """Sum of the seconds of all reads."""

    # Requests ---------------------------------------------------------------------------------------------

    def hold(
        self, request_id: str, keys: Sequence[AdapterKey], on_ready: Callable[[str], object], priority: int = 0
    ) -> None:
        """Ask for places in host memory, until `release`. keys: at most as many as there are slots.

        on_ready: called with the id when all ranks have read all of them, maybe at once. priority: that of the request;
        smaller ones get places earlier.
        """
        self._keys[request_id] = tuple(dict.fromkeys(keys))
        self._on_ready[request_id] = on_ready
        self._waiting[request_id] = priority
        self._give_places()

    def release(self, request_id: str) -> None:
        """End the waiting of a request, or give back all that it holds. Unknown ids are ignored."""
        self._let_go(request_id)
        self._give_places()

    def _let_go(self, request_id: str) -> None:
        self.free_slots(request_id)
        self._waiting.pop(request_id, None)
        self._on_ready.pop(request_id, None)
        for key in self._keys.pop(request_id, ()):
            if (adapter := self._adapters.get(key)) is not None:
                adapter.holders.discard(request_id)
                if not (adapter.holders or adapter.is_read) and key in self._to_read:
                    del self._to_read[key], self._adapters[key]

    def refusal(self, keys: Iterable[AdapterKey]) -> ItemError | None:
        """Error for the first of the files that have ended so many workers that none reads it again; None: no file."""
        for key in keys:
            if (num_deaths := self._deaths[key]) >= MAX_DEATHS_OF_A_FILE:
                message = f"the LoRA adapter {key.file} is refused: {num_deaths} workers died while they read it"
                return ItemError(message, "invalid", param="lora_request")
        return None

    def is_ready(self, request_id: str) -> bool:
        """Whether all ranks have read all adapters of the request; also true of one without adapters."""
        keys = self._keys.get(request_id, ())
        return request_id not in self._waiting and all(self._adapters[key].is_read for key in keys)

    def take_slots(self, request_id: str) -> bool:
        """Take slots on the device for a request that is ready. False, and nothing changes: too many are in use, or an
        adapter waits for a slot to be loaded into."""
        if self._due_loads() and not self._next_loads()[0]:
            return False
        mine = [self._adapters[key] for key in self._keys.get(request_id, ())]
        new = [adapter for adapter in mine if not adapter.on_device]
        leaving = self._idle_on_device(but=mine)
        kept = [adapter for adapter in self._adapters.values() if adapter.on_device]
        dropped: list[AdapterKey] = []
        while not self._fits([*kept, *new]):
            if not leaving:
                return False
            dropped.append(leaving.pop(0))
            kept.remove(self._adapters[dropped[-1]])
        self._drop(dropped)
        for key, adapter in zip(self._keys.get(request_id, ()), mine):
            adapter.on_device = True
            adapter.users.add(request_id)
            self._adapters[key] = self._adapters.pop(key)  # now the most recently used one
        return True

    def free_slots(self, request_id: str) -> None:
        """End the use of the device by a request, which begins again or ends."""
        for key in self._keys.get(request_id, ()):
            if (adapter := self._adapters.get(key)) is not None:
                adapter.users.discard(request_id)

    # Reads and drops --------------------------------------------------------------------------------------

    def take_reads(self) -> list[AdapterKey]:
        """Files that all ranks shall begin to read now. One under which a worker died is read alone."""
        first: list[AdapterKey] = []
        for key in list(self._to_read):
            if len(self._reading) >= (1 if self._has_suspect((key, *self._reading)) else MAX_READS):
                break
            del self._to_read[key]
            self._reading.add(key)
            first.append(key)
        return first

    def kept_files(self, key: AdapterKey) -> KeptFiles | None:
        """Open files of an adapter that has a place; None: it is read at its path."""
        adapter = self._adapters.get(key)
        return None if adapter is None or adapter.opened is None else adapter.opened.files

    def take_drops(self) -> list[AdapterKey]:
        """Adapters that leave the device with the next plan."""
        taken, self._to_drop = list(self._to_drop), {}
        return taken

    def take_forgets(self) -> list[AdapterKey]:
        """Adapters that leave host memory, if they are there."""
        taken, self._to_forget = list(self._to_forget), {}
        return taken

    def take_loads(self) -> list[AdapterKey]:
        """Adapters that the model loads in the next plan, each into a slot that is free or that an idle one leaves.

        Others wait until a request has ended; meanwhile none with adapters begins.
        """
        taken, dropped = self._next_loads()
        self._drop(dropped)
        for key in taken:
            del self._to_load[key]
            self._loading.add(key)
            self._adapters[key].on_device = True
        return taken

    @property
    def has_work(self) -> bool:
        """Whether a plan is due for adapters alone."""
        return bool(self._to_drop or self._next_loads()[0])

    def note_read(self, read: AdapterRead, in_step: bool = False) -> dict[str, ItemError]:
        """Take the result of a read. Returns the error for each request that it ends; `release` follows.

        in_step: whether it is the result of a plan's `load_adapters`.
        """
        (self._loading if in_step else self._reading).discard(read.key)
        if in_step or not self._loads_in_steps or read.error is not None:
            self._deaths.pop(read.key, None)
        self.load_seconds += read.seconds
        if self._loads_in_steps and not in_step and read.error is None:
            if read.key in self._adapters:
                self._to_load[read.key] = None
                self._adapters[read.key].num_bytes = read.num_bytes
            return {}
        if (adapter := self._adapters.get(read.key)) is None:
            self._to_forget[read.key] = None  # a read that was under way when the workers dropped all adapters
            return {}
        if adapter.is_read:
            return {}
        holders = list(adapter.holders)
        if read.error is not None:
            self._forget([read.key])  # other ranks may have read it
            for request_id in holders:
                self._keys[request_id] = tuple(key for key in self._keys[request_id] if key != read.key)
            self._give_places()
            return dict.fromkeys(holders, read.error)
        self.num_loads += 1
        adapter.is_read = True
        if not in_step:  # a load counts no bytes; the read before it did
            adapter.num_bytes = read.num_bytes
        self._opened.pop(read.key, None)
        self._tell_ready(holders)
        self._give_places()  # where its holders ended meanwhile
        return {}

    def drop_idle(self) -> None:
        """Drop all adapters that no request runs with from the device."""
        self._drop(self._idle_on_device())

    def forget(self, is_forgotten: Callable[[AdapterKey], bool]) -> None:
        """Drop adapters that no request holds from the device and from host memory."""
        self._forget(
            [key for key, its in self._adapters.items() if not its.holders and its.is_read and is_forgotten(key)]
        )
        self._opened = {key: opened for key, opened in self._opened.items() if not is_forgotten(key)}

    def reset(self, has_died: bool = True) -> dict[str, ItemError]:
        """Begin again with workers that have read nothing: all places that are held must be read again.

        has_died: whether a worker's death is the reason; otherwise no file is suspected.
        Returns the error for each request that it ends, because too many workers died while they read its file.
        """
        suspects = self._reading | self._loading if has_died else set()
        self._deaths.update(suspects)
        failed: dict[str, ItemError] = {}
        for request_id, keys in self._keys.items():
            if (error := self.refusal(suspects.intersection(keys))) is not None:
                failed[request_id] = error
        for message in dict.fromkeys(error.message for error in failed.values()):
            logger.error(message)
        for request_id in failed:
            self._let_go(request_id)
        held = {key: adapter for key, adapter in self._adapters.items() if adapter.holders}
        idle = {key: its.opened for key, its in self._adapters.items() if key not in held and its.opened is not None}
        self._opened = dict(list({**self._opened, **idle}.items())[-self._num_places :])
        self._adapters = {key: _Adapter(its.holders, opened=its.opened) for key, its in held.items()}
        self._reading, self._loading = set(), set()
        self._to_load, self._to_drop, self._to_forget = {}, {}, {}
        self._to_read = dict.fromkeys(sorted(self._adapters, key=self._deaths.__getitem__))  # suspects come last
        self._give_places()
        return failed

    # Numbers ----------------------------------------------------------------------------------------------

    def state(self, key: AdapterKey) -> AdapterState:
        """Place of the adapter on this replica: on the device, in host memory, or neither (`disk`)."""
        adapter = self._adapters.get(key)
        if adapter is None or not adapter.is_read:
            return "disk"
        return "device" if adapter.on_device else "host"

    @property
    def num_on_device(self) -> int:
        return sum(adapter.on_device for adapter in self._adapters.values())

    @property
    def num_on_host(self) -> int:
        """Adapters in host memory, those on the device included."""
        return len(self._adapters)

    @property
    def num_held(self) -> int:
        """Adapters that requests hold."""
        return sum(bool(adapter.holders) for adapter in self._adapters.values())

    # Helpers ----------------------------------------------------------------------------------------------

    def _give_places(self) -> None:
        """Give places to the first of the waiting requests, as far as there is room."""
        while self._waiting:
            request_id = min(self._waiting, key=self._waiting.__getitem__)
            keys = self._keys[request_id]
            new = [key for key in keys if key not in self._adapters]
            idle = [key for key, its in self._adapters.items() if its.is_read and not its.holders and key not in keys]
            surplus = len(self._adapters) + len(new) - self._num_places
            if surplus > len(idle):
                return
            evicted = idle[: max(surplus, 0)]
            self._forget(evicted)
            self.num_evictions += len(evicted)
            for key in new:
                self._adapters[key] = _Adapter(opened=self._opened.get(key) or open_adapter(key))
                self._to_read[key] = None
            for key in keys:
                self._adapters[key].holders.add(request_id)
            del self._waiting[request_id]
            self._tell_ready([request_id])

    def _has_suspect(self, keys: Iterable[AdapterKey]) -> bool:
        return any(key in self._deaths for key in keys)

    def _due_loads(self) -> list[AdapterKey]:
        """Adapters that may be loaded when there are slots; one under which a worker died is loaded alone."""
        if self._has_suspect((*self._to_load, *self._loading)):
            return [] if self._loading else list(self._to_load)[:1]
        return list(self._to_load)

    def _next_loads(self) -> tuple[list[AdapterKey], list[AdapterKey]]:
        """The first of the due loads, as many as there are slots for, and the idle adapters that leave theirs."""
        kept = [its for its in self._adapters.values() if its.on_device]
        idle, loads, dropped = self._idle_on_device(), [], []
        for key in self._due_loads():
            adapter = self._adapters[key]
            while idle and not self._fits([*kept, adapter]):
                dropped.append(idle.pop(0))
                kept.remove(self._adapters[dropped[-1]])
            if not self._fits([*kept, adapter]):
                break
            kept.append(adapter)
            loads.append(key)
        return loads, dropped

    def _tell_ready(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if self.is_ready(request_id):
                self._on_ready[request_id](request_id)

    def _idle_on_device(self, but: Iterable[_Adapter] = ()) -> list[AdapterKey]:
        """Adapters on the device that no request runs with, the least recently used first."""
        kept = list(but)
        return [key for key, its in self._adapters.items() if its.on_device and not its.users and its not in kept]

    def _fits(self, adapters: Sequence[_Adapter]) -> bool:
        return len(adapters) <= self._num_slots or sum(its.num_bytes for its in adapters) < self._device_bytes

    def _drop(self, keys: Iterable[AdapterKey]) -> None:
        for key in keys:
            self._adapters[key].on_device = False
            self._to_drop[key] = None
            self.num_evictions += 1

    def _forget(self, keys: Iterable[AdapterKey]) -> None:
        for key in keys:
            if self._adapters.pop(key).on_device:
                self._to_drop[key] = None
            self._to_forget[key] = None
