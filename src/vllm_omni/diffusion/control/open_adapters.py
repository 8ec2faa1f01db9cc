"""Open files of adapters: workers read them again after a restart, also where they were removed or replaced."""

from __future__ import annotations

import errno
import logging
import os
import weakref
from pathlib import Path

from vllm_omni.diffusion.messages.adapters import AdapterKey, KeptFiles
from vllm_omni.inputs.adapter_files import file_stamp, kept_state, settings_files

logger = logging.getLogger(__name__)
_GONE = (errno.ENOENT, errno.ENOTDIR)


class OpenAdapter:
    """Files of one adapter, which stay open until this object is dropped.

    A descriptor costs no copy, and the file system keeps the contents of an open file.
    """

    def __init__(self, file: str) -> None:
        """file: path of the safetensors file. Raises OSError."""
        self._descriptors: list[int] = []
        weakref.finalize(self, _close, self._descriptors)
        weights = self._open(file)
        settings = tuple(self._open(str(place)) for place in settings_files(Path(file)) if place.is_file())
        self.files = KeptFiles(weights, settings, kept_state([weights, *settings]))

    def _open(self, path: str) -> str:
        # A pipe that has taken the file's place must not block.
        self._descriptors.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        return f"/proc/{os.getpid()}/fd/{self._descriptors[-1]}"


def open_adapter(key: AdapterKey) -> OpenAdapter | None:
    """Open the files of an adapter. None: they are not in the state of `key` any more, or cannot be opened."""
    if not key.stamp:
        return None
    try:
        opened = OpenAdapter(key.file)
        is_named_state = file_stamp(key.file) == key.stamp
    except OSError as error:
        if error.errno not in _GONE:
            logger.warning(
                "the LoRA adapter %s is not kept open (%s): if it is removed, a worker that is replaced cannot read it",
                key.file,
                error,
            )
        return None
    return opened if is_named_state else None


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
