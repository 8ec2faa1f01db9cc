"""Work that adapters add to a token, from the headers of their files. A price needs no exact number: unreadable files
are free here, and the workers refuse them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from vllm_omni.diffusion.catalog.weight_files import read_header
from vllm_omni.diffusion.messages.request import LoRA
from vllm_omni.errors import ConfigError

_PAIR = re.compile(r".*[._](?:lora_A|lora_B|lora_down|lora_up|down|up)(?:\.\w+)?\.weight")
"""Keys of A and B, as trainers write them."""
_MODULATION = re.compile(r"_mod[._]|modulation|time_|t_embedder", re.IGNORECASE)
"""Parts of the names of layers that are computed once for a timestep, not for each token."""
_SECOND = "transformer_2."
"""Prefix of the keys for a model's second transformer; a step runs one of the two."""


def num_adapter_weights(loras: Sequence[LoRA]) -> int:
    """Weights in A and B of these adapters that belong to layers of tokens.

    A token costs two operations for each of them that it meets, as for each weight of the layers themselves.
    """
    return sum(_weights_at(lora.path) for lora in loras)


def _weights_at(file: str) -> int:
    try:
        found = os.stat(file)
    except OSError:
        return 0
    return _weights_in(file, (found.st_ino, found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=4096)
def _weights_in(file: str, stamp: tuple[int, ...]) -> int:
    """Weights in the file. stamp: of its content; a replaced file has another one."""
    path = Path(os.path.realpath(file))  # the header is read in a model folder's way, which follows no link out of it
    try:
        header = read_header(path.parent, path.name)
    except ConfigError:
        return 0
    counts = [0, 0]
    for key, weight in header.items():
        if _PAIR.fullmatch(key) and not _MODULATION.search(key):
            counts[key.startswith(_SECOND)] += math.prod(weight.shape)
    return max(counts)
