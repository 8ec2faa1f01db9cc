"""Ways in which a model folder is broken: each changes a copy of a good folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Breakage = Callable[[Path], object]

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
PAGE = "<!DOCTYPE html><html>Not found</html>"


def text(name: str, value: str) -> Breakage:
    """Write `value` in place of the file `name`."""
    return lambda folder: (folder / name).write_text(value)


def values(name: str, **changed: Any) -> Breakage:
    """Change keys of the JSON object in the file `name`."""

    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changed))

    return change


def section(name: str, key: str, **changed: Any) -> Breakage:
    """Change keys of an object inside the JSON object in the file `name`."""

    def change(folder: Path) -> None:
        whole = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(whole | {key: whole[key] | changed}))

    return change


def removed(name: str) -> Breakage:
    return lambda folder: (folder / name).unlink()


def moved(name: str, target: str) -> Breakage:
    return lambda folder: (folder / name).rename(folder / target)


def folder_instead(name: str) -> Breakage:
    """Put a folder in place of the file `name`."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def outside_of(folder: Path) -> Path:
    """RankInfo beside the model folder, where `linked_outside` moves things."""
    return folder.parent / "outside"


def linked_outside(name: str) -> Breakage:
    """Move a file or folder out of the model folder, and link to it."""

    def change(folder: Path) -> None:
        target = outside_of(folder) / Path(name).name
        target.parent.mkdir()
        (folder / name).rename(target)
        (folder / name).symlink_to(target)

    return change


def linked_to(name: str, target: str) -> Breakage:
    """Put a link in place of the file `name`."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def cut(name: str, num_bytes: int) -> Breakage:
    """Leave the first bytes of a file, or with a negative number all but the last ones."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:num_bytes])


def weights(name: str, change: Callable[[dict[str, np.ndarray]], object]) -> Breakage:
    """Change the weights in the safetensors file `name`."""

    def rewrite(folder: Path) -> None:
        stored = load_file(folder / name)
        change(stored)
        save_file(stored, folder / name, metadata={"format": "pt"})

    return rewrite


def sharded(component: str, stem: str, weight_map: Callable[[dict[str, str]], object] = lambda names: None) -> Breakage:
    """Cut the component's weight file into two shards with an index, which `weight_map` changes."""

    def change(folder: Path) -> None:
        file = folder / component / f"{stem}.safetensors"
        stored = load_file(file)
        file.unlink()
        names = sorted(stored)
        halves = (names[: len(names) // 2], names[len(names) // 2 :])
        index: dict[str, str] = {}
        for number, half in enumerate(halves, 1):
            shard = f"{stem}-0000{number}-of-00002.safetensors"
            save_file({name: stored[name] for name in half}, file.with_name(shard), metadata={"format": "pt"})
            index |= dict.fromkeys(half, shard)
        weight_map(index)
        (folder / component / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    return change


def both(*breakages: Breakage) -> Breakage:
    """One after another."""

    def change(folder: Path) -> None:
        for breakage in breakages:
            breakage(folder)

    return change
