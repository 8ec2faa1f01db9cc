"""Model folders as the hub leaves them: shards, links into a cache of blobs, no permission to write."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from testbed.single_files import shard
from testbed.tiny_models import build_tiny_qwen_image
from testbed.tiny_wan import build_tiny_wan
from testbed.tiny_z_image import build_tiny_z_image
from tests.diffusion.compute.families.test_single_files import ARGUMENTS, SMALL_VIDEO, drawn

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "qwen_image": build_tiny_qwen_image,
    "z_image": build_tiny_z_image,
    "wan": partial(build_tiny_wan, kind="t2v-a14b", default_sampling_params=SMALL_VIDEO),
}


def as_snapshot(folder: Path, cache: Path) -> Path:
    """The folder as a snapshot in a cache of the hub: every file is a link to a blob that is named by a hash."""
    repository = cache / "models--painter--tiny"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("a" * 40)
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(file for file in folder.rglob("*") if file.is_file())):
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = shutil.move(file, blobs / f"{number:064x}")
        link.symlink_to(Path(*[".."] * (len(link.relative_to(repository).parts) - 1)) / "blobs" / Path(blob).name)
    return snapshot


def state(folder: Path) -> dict[Path, int]:
    return {file: file.lstat().st_mtime_ns for file in (folder, *folder.rglob("*"))}


@pytest.mark.parametrize("family", [pytest.param("wan", marks=pytest.mark.thorough), "z_image", "qwen_image"])
def test_a_sharded_snapshot_that_nobody_may_write_is_loaded(family: str, tmp_path: Path) -> None:
    folder = BUILDERS[family](tmp_path / "model")
    wanted = drawn(folder, ARGUMENTS[family])
    for file in list(folder.glob("*/*.safetensors")):
        shard(file.parent, file.stem)
    cache = tmp_path / "cache"
    snapshot = as_snapshot(folder, cache)
    assert all(file.is_symlink() for file in snapshot.rglob("*.safetensors"))
    for entry in cache.rglob("*"):
        if not entry.is_symlink():
            entry.chmod(0o555 if entry.is_dir() else 0o444)
    before = state(cache)
    try:
        picture = drawn(snapshot, ARGUMENTS[family])
        assert state(cache) == before
    finally:
        for entry in [cache, *cache.rglob("*")]:
            if entry.is_dir():
                entry.chmod(0o755)  # so that pytest can remove it
    assert np.array_equal(picture, wanted)
