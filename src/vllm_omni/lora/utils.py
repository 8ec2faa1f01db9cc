"""Numbers of LoRA adapters, for scripts of the public vllm-omni package."""

from __future__ import annotations

import hashlib
import os


def stable_lora_int_id(path: str | os.PathLike[str]) -> int:
    """Positive number of 31 bits that depends on `path` only.

    `LoRARequest` accepts it as `lora_int_id` and ignores it: adapters are identified by name and path.
    """
    digest = hashlib.blake2b(os.fsencode(path), digest_size=4).digest()
    return max(1, int.from_bytes(digest, "big") >> 1)
