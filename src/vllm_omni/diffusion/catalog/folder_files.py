"""Reading of files in a model folder, never outside of it; an error is one line with the file. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

from vllm_omni.errors import ConfigError
from vllm_omni.inputs.field_values import shown

MODEL_INDEX = "model_index.json"
"""File with the names of the pipeline's class and components."""
DEFAULTS_FILE = "default_sampling_params.json"
"""Optional file with the model's own default sampling parameters."""
ADAPTERS_FILE = "adapters.json"
"""Optional file with the LoRA adapters that the model folder brings."""
TEA_CACHE_FILE = "teacache.json"
"""Optional file with the model's own polynomial for TeaCache."""
GIT_LFS = b"version https://git-lfs"  # first bytes of a pointer, the stand-in for a file that was not fetched


def names_in(root: Path, folder: str) -> list[str]:
    """Names in a subfolder of the model folder `root`, sorted. Raises ConfigError if it cannot be read."""
    try:
        return sorted(entry.name for entry in _resolve(root, folder).iterdir())
    except OSError as error:
        raise ConfigError(f"{folder}/ cannot be read: {error.strerror}") from error


def open_file(root: Path, name: str) -> BinaryIO:
    """Open the file `name` of the model folder `root`. Raises ConfigError if it is not readable or lies outside.

    A link into the hub's cache is allowed, because the cache's folders consist of such links.
    """
    return open_path(regular_file(root, name), name)


def open_path(path: Path, name: str) -> BinaryIO:
    """Open a file. name: how errors call it. Raises ConfigError if it cannot be read or is a Git LFS pointer."""
    try:
        stream = path.open("rb")
        if stream.peek(len(GIT_LFS)).startswith(GIT_LFS):
            stream.close()
            raise ConfigError(f"cannot read {name}: it is a Git LFS pointer, not the file itself; run git lfs pull")
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}") from error
    return stream


def regular_file(root: Path, name: str) -> Path:
    """Resolved path of the file `name`, which may be missing. Raises ConfigError as `open_file` does."""
    target = _resolve(root, name)
    try:
        if target.exists() and not target.is_file():  # a pipe would block
            raise ConfigError(f"cannot read {name}: it is {'a folder' if target.is_dir() else 'no regular file'}")
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}") from error
    return target


def check_links(root: Path, folder: str) -> None:
    """Raise ConfigError for a link that leads out of `root`, at any depth of a subfolder of the model folder `root`.

    The libraries open more files of a component than we check one by one. A dangling link is allowed: nobody opens it.
    """
    seen: set[Path] = set()
    waiting = [folder]
    while waiting:
        name = waiting.pop()
        target = _resolve_inside(root, name)
        if target.is_dir() and target not in seen:  # links may form a circle
            seen.add(target)
            waiting += [f"{name}/{entry}" for entry in names_in(root, name)]


def _resolve(root: Path, name: str) -> Path:
    """Resolved path of `name`. Raises ConfigError for links that lead out of `root`, and for dangling links."""
    target = _resolve_inside(root, name)
    if (root / name).is_symlink() and not target.exists():
        raise ConfigError(f"cannot read {name}: it is a link to {target}, which does not exist")
    return target


def _resolve_inside(root: Path, name: str) -> Path:
    """Resolved path of `name`, which may not exist. Raises ConfigError for links that lead out of `root`."""
    try:
        target = (root / name).resolve()
        is_inside = target.is_relative_to(root.resolve())
    except (OSError, RuntimeError) as error:  # the class for a loop of links depends on the release of Python
        raise ConfigError(f"cannot read {name}: its links lead nowhere ({error})") from error
    # A file or folder of a model in the hub's cache.
    is_cached = any(p.name in ("blobs", "snapshots") and p.parent.name.startswith("models--") for p in target.parents)
    if not is_inside and not is_cached:
        raise ConfigError(f"cannot read {name}: it is a link to {target}, outside of the model's folder")
    return target


def read_object(root: Path, name: str) -> dict[str, Any]:
    """JSON object in the file `name` of the model folder `root`. Raises ConfigError for other content."""
    with open_file(root, name) as stream:
        try:
            value = json.loads(stream.read().decode("utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {name}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"cannot read {name}: no valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"cannot read {name}: it must hold a JSON object, got {shown(value)}")
    return value
