"""Packages of a test's own that look as if they were compiled against PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

CPU = ("libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so")
CUDA = (*CPU, "libc10_cuda.so", "libtorch_cuda.so")


def elf_names(libraries: Sequence[str]) -> bytes:
    """A file with a table of names such as an ELF file has."""
    return b"\x7fELF code\0" + b"".join(name.encode() + b"\0" for name in (*libraries, "libc.so.6", "_ZN2at6Tensor"))


def install(folder: Path, name: str, needs: Sequence[str]) -> None:
    """A package that fails when it is imported, as one does whose extension cannot be loaded."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (folder / name / "version.py").write_text("__version__ = '0.28.0+cu999'\ngit_version = '8fb8771'\n")
    (folder / name / "_C.so").write_bytes(elf_names(needs))
    (folder / f"{name}-0.28.0.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.28.0\n"
    (folder / f"{name}-0.28.0.dist-info" / "METADATA").write_text(metadata)


def install_mismatched_torchvision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Install a torchvision of another build for the rest of the test; the start of the message about it."""
    install(folder, "torchvision", [*CPU, "libtorch_of_another_build.so"])
    monkeypatch.syspath_prepend(folder)
    return "torchvision 0.28.0+cu999 (it needs libtorch_of_another_build.so) does not match the installed torch 2."
