"""`ScratchFolder`: files of a process that died are removed, those of a process that runs stay."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_omni.video_jobs.scratch import ScratchFolder

HOLDER = """
import pathlib, sys
from vllm_omni.video_jobs.scratch import ScratchFolder
folder = ScratchFolder.open(pathlib.Path(sys.argv[1]))
(folder.path / "video.mp4").write_bytes(b"half a video")
print(folder.path, flush=True)
sys.stdin.read()
"""


def test_a_folder_is_removed_when_it_is_closed(tmp_path: Path) -> None:
    folder = ScratchFolder.open(tmp_path / "new" / "scratch")
    (folder.path / "video.mp4").write_bytes(b"half a video")
    assert folder.path.stat().st_mode & 0o777 == 0o700, "input pictures and videos are the clients'"
    folder.close()
    assert not os.listdir(tmp_path / "new" / "scratch")


def test_the_folder_of_a_killed_process_is_removed_at_the_next_start_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        held = Path(holder.stdout.readline().strip())
        first = ScratchFolder.open(tmp_path)
        assert (held / "video.mp4").exists(), "its process runs"
        holder.kill()
    second = ScratchFolder.open(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([first.path, second.path, tmp_path / "other"])
    first.close()
    second.close()
    assert os.listdir(tmp_path) == ["other"]


def test_a_process_forked_meanwhile_keeps_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    real_open = os.open

    def copied(*args: Any, **kwargs: Any) -> int:
        descriptor = real_open(*args, **kwargs)
        copies.append(os.dup(descriptor))  # shares the lock, as a forked process' descriptor does
        return descriptor

    with monkeypatch.context() as forks:
        forks.setattr(os, "open", copied)
        first = ScratchFolder.open(tmp_path)
    parent = real_open(tmp_path, os.O_RDONLY)
    fcntl.flock(parent, fcntl.LOCK_EX | fcntl.LOCK_NB)  # does not raise
    for descriptor in (parent, *copies):
        os.close(descriptor)
    first.close()
