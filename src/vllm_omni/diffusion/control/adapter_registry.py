"""Registry of the adapters that requests may name. It changes while the engine runs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.adapter_files import file_stamp
from vllm_omni.inputs.adapter_names import check_adapter_name, is_adapter_name, listed
from vllm_omni.inputs.adapter_paths import file_within
from vllm_omni.inputs.adapters import ServedAdapter
from vllm_omni.inputs.field_values import WrongValueError, shown

SETTLED_SECONDS = 2.0
"""Age from which the modification time of a folder tells a later change apart."""
RELIST_SECONDS = 0.5
"""Age from which the listing of a folder that has just changed is made again."""
_MAX_ECHO = 64


class AdapterRegistry:
    """Adapters by name: those given at start, those loaded since, and the files of `--lora-dir` folders.

    One thread, the engine's event loop, changes the adapters. Any thread may read them; a read also updates
    the stamps and the listings of folders, each in one assignment.
    """

    def __init__(self, config: OmniDiffusionConfig) -> None:
        """config: of `with_adapter_files`."""
        self._adapters = {
            name: ServedAdapter(name, file, config.lora_defaults.get(name, {}))
            for name, file in config.lora_modules.items()
        }
        """Replaced at each change, so that readers in other threads see one state or the other."""
        self._defaults = {
            name: defaults for name, defaults in config.lora_defaults.items() if name not in config.lora_modules
        }
        """Defaults of files in folders. Those of a given adapter belong to its own file."""
        self._folders = [AdapterFolder(Path(folder)) for folder in config.lora_dirs]
        self._stamps: dict[str, str] = {}
        """Last stamp of each served file that was there: one that is gone is served from memory."""

    def names(self) -> tuple[str, ...]:
        """Names in order: given at start, loaded since, then those of the folders, sorted."""
        return tuple(adapter.name for adapter in self)

    @property
    def given(self) -> Collection[str]:
        """Names given at start or loaded since."""
        return self._adapters.keys()

    @property
    def num_loaded(self) -> int:
        """Number of names that loads have added."""
        return sum(adapter.source == "loaded" for adapter in self._adapters.values())

    def get(self, name: str) -> ServedAdapter | None:
        """Adapter of this name; None: no request can name it."""
        if (adapter := self._adapters.get(name)) is not None:
            return adapter
        file = self._folder_files().get(name)
        return None if file is None else self._listed(name, file)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.get(name) is not None

    def __iter__(self) -> Iterator[ServedAdapter]:
        """Iterate over all adapters in the order of `names`."""
        given = self._adapters
        yield from given.values()
        files = self._folder_files()  # once: each listing looks at all folders
        yield from (self._listed(name, file) for name, file in files.items() if name not in given)

    def _listed(self, name: str, file: str) -> ServedAdapter:
        return ServedAdapter(name, file, self._defaults.get(name, {}), "folder")

    def stamp(self, file: str) -> str:
        """Present `file_stamp` of the file; that of the last call where a file that is served is gone."""
        stamp = file_stamp(file)
        if stamp and any(adapter.file == file for adapter in self._adapters.values()):
            self._stamps[file] = stamp
        return stamp or self._stamps.get(file, "")

    def require(self, name: str, param: str = "lora_request") -> ServedAdapter:
        """Adapter of this name. Raises InvalidRequestError, with the names that are served, for any other."""
        if (adapter := self.get(name)) is None:
            raise InvalidRequestError(
                f"there is no LoRA adapter {name[:_MAX_ECHO]!r}; served: {listed(self.names())}",
                param=param,
            )
        return adapter

    def check_free(self, name: str, replace: bool = False) -> None:
        """Raise InvalidRequestError for a name that no adapter may have, or that one has which was loaded.

        A file that a folder lists may be loaded under its own name. replace: whether the name of a loaded adapter is
        accepted.
        """
        try:
            check_adapter_name(name)
        except WrongValueError as error:
            raise InvalidRequestError(f"an adapter takes {error}, got {shown(name)}", param="name") from error
        if name in self._adapters and not replace:
            raise InvalidRequestError(
                f"the LoRA adapter {name!r} has already been loaded; to replace it, give replace=True "
                '(over HTTP "load_inplace": true)',
                param="name",
            )

    def put(self, adapter: ServedAdapter, stamp: str = "") -> None:
        """Serve an adapter from now on, in place of one with its name.

        stamp: of its file when it was read. With it the adapter is served from memory if the file is gone.
        """
        if stamp:
            self._stamps[adapter.file] = stamp
        self._set({**self._adapters, adapter.name: adapter})

    def remove(self, name: str) -> ServedAdapter:
        """Stop serving an adapter; one of a folder stays listed. Raises InvalidRequestError for an unknown name."""
        adapter = self.require(name, "name")
        self._set({other: its for other, its in self._adapters.items() if other != name})
        return adapter

    def _set(self, adapters: dict[str, ServedAdapter]) -> None:
        """Replace the adapters, and forget the stamps of files that none of them has. Other threads may add stamps."""
        files = {adapter.file for adapter in adapters.values()}
        self._adapters = adapters
        self._stamps = {file: stamp for file, stamp in list(self._stamps.items()) if file in files}

    def _folder_files(self) -> dict[str, str]:
        """Files of all folders by name; the first folder that has a name wins."""
        files: dict[str, str] = {}
        for folder in self._folders:
            files = {**folder.files(), **files}
        return dict(sorted(files.items()))


@dataclass(frozen=True)
class _Listing:
    """Files of a folder, and the modification times that they are valid for."""

    times: dict[str, int]
    """Modification time in nanoseconds of the folder and of the folders in it, by path."""
    files: dict[str, str]
    made: float
    """Monotonic time."""
    seen: float
    """Monotonic time at which these modification times were first seen."""
    is_settled: bool
    """Whether later changes have other modification times."""

    @property
    def is_valid(self) -> bool:
        if any(_modified(path) != then for path, then in self.times.items()):
            return False
        return self.is_settled or time.monotonic() - self.made <= RELIST_SECONDS


class AdapterFolder:
    """Folder of adapters: its safetensors files by stem, and folders with one safetensors file by their own name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listing: _Listing | None = None

    def files(self) -> dict[str, str]:
        """Name -> absolute path of the file. Files outside the folder, by a link, are left out. Empty: it is gone."""
        listing = self._listing
        if listing is None or not listing.is_valid:
            listing = self._listing = self._list(listing)
        return listing.files

    def _list(self, last: _Listing | None) -> _Listing:
        times = {str(self._folder): _modified(str(self._folder))}
        files: dict[str, str] = {}
        try:
            entries = sorted(os.scandir(self._folder), key=lambda entry: (entry.is_file(), entry.name))
        except OSError:
            entries = []
        for entry in entries:  # files last: they win over folders of the same name
            if entry.is_dir():
                times[entry.path] = _modified(entry.path)
            elif not entry.name.endswith(".safetensors"):
                continue
            name = entry.name.removesuffix(".safetensors")
            with contextlib.suppress(WrongValueError, OSError):  # no adapter within the folder, or gone meanwhile
                if is_adapter_name(name):
                    files[name] = file_within(entry.name, [str(self._folder)])
        now = time.monotonic()
        seen = last.seen if last is not None and last.times == times else now
        age = (time.time_ns() - max(times.values())) / 1e9  # negative where another machine's clock is ahead
        return _Listing(times, files, now, seen, age > SETTLED_SECONDS or now - seen > SETTLED_SECONDS)


def _modified(path: str) -> int:
    """Modification time in nanoseconds; 0: there is nothing at the path."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0
