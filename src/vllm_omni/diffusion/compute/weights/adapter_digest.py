"""Digest of an adapter file: tells whether two files change a model alike."""

from __future__ import annotations

import hashlib

import torch

from vllm_omni.diffusion.compute.weights.adapter_file import AdapterFile


def adapter_digest(contents: AdapterFile) -> str:
    """Hexadecimal digest of the names, weights and scales of all changes in the file, in any order."""
    digest = hashlib.blake2b(digest_size=16)
    for change in sorted(contents.changes, key=lambda change: change.keys):
        digest.update(f"{change.scale!r}\n".encode())
        for key, weight in zip(change.keys, change.weights, strict=True):
            digest.update(f"{key} {weight.dtype} {list(weight.shape)}\n".encode())
            digest.update(weight.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
