"""A torchvision or torchaudio that does not match PyTorch ends the start with one line; one that matches does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.fake_packages import CPU, CUDA, elf_names, install, install_mismatched_torchvision
from vllm_omni import AsyncOmni, Omni
from vllm_omni.diffusion.control.compiled_packages import Package, check_compiled_packages, find_fault
from vllm_omni.entrypoints.cli.main import main
from vllm_omni.errors import ConfigError


def make_torch(folder: Path, build: str, libraries: Sequence[str] = CPU) -> Package:
    (folder / "torch" / "lib").mkdir(parents=True)
    for name in libraries:
        (folder / "torch" / "lib" / name).touch()
    return Package("torch", build, folder / "torch")


def make_package(folder: Path, build: str, needs: Sequence[str] = CPU, requires: str = "torch (==2.13.0)") -> Package:
    (folder / "torchvision").mkdir(parents=True)
    (folder / "torchvision" / "_C.so").write_bytes(elf_names(needs))
    return Package("torchvision", build, folder / "torchvision", ["numpy", requires, 'torch (==1) ; extra == "old"'])


@pytest.mark.parametrize(
    ("torch", "libraries", "needs", "requires"),
    [
        ("2.13.0+cu130", CUDA, CUDA, "torch (==2.13.0)"),
        ("2.13.0+cpu", CPU, CPU, "torch==2.13.0"),
        ("2.13.0+cu130", CUDA, CPU, "torch==2.13.0"),
        ("2.13.1+cu130", CUDA, CUDA, "torch==2.13.0"),
        ("2.13.0+cpu", CPU, CPU, "torch==2.13.0+cpu"),
        ("2.14.0a0+git5c48869", CUDA, CUDA, "torch>=2.14.0"),
        ("2.14.1", CUDA, CUDA, "torch"),
        ("2.13.0", (), CUDA, "torch==2.13.*"),  # a distribution's own packaging, whose libraries lie elsewhere
    ],
)
def test_builds_that_match_are_taken(
    torch: str, libraries: Sequence[str], needs: Sequence[str], requires: str, tmp_path: Path
) -> None:
    package = make_package(tmp_path, "0.28.0+cu130", needs, requires)
    assert find_fault(package, make_torch(tmp_path, torch, libraries)) is None


@pytest.mark.parametrize(
    ("torch", "libraries", "needs", "requires", "fault"),
    [
        ("2.13.0+cpu", CPU, CUDA, "torch (==2.13.0)", "it needs libc10_cuda.so, libtorch_cuda.so"),
        ("2.14.1+cu130", CUDA, CUDA, "torch (==2.13.0)", "it requires torch==2.13.0"),
        ("2.13.0+cu130", CUDA, CUDA, "torch>=2.14.0", "it requires torch>=2.14.0"),
        ("2.13.0+cu126", CUDA, CUDA, "torch==2.13.0", "it is built for CUDA 13"),
    ],
)
def test_builds_that_do_not_match_are_told_apart(
    torch: str, libraries: Sequence[str], needs: Sequence[str], requires: str, fault: str, tmp_path: Path
) -> None:
    package = make_package(tmp_path, "0.28.0+cu130", needs, requires)
    assert find_fault(package, make_torch(tmp_path, torch, libraries)) == fault


def test_libraries_of_the_package_itself_are_not_missed(tmp_path: Path) -> None:
    package = make_package(tmp_path, "2.13.0+cpu", (*CPU, "libtorchaudio.so"))
    torch = make_torch(tmp_path, "2.13.0+cpu")
    assert find_fault(package, torch) == "it needs libtorchaudio.so"
    (package.folder / "lib").mkdir()
    (package.folder / "lib" / "libtorchaudio.so").write_bytes(elf_names(CPU))
    assert find_fault(package, torch) is None


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return install_mismatched_torchvision(tmp_path, monkeypatch)


def test_the_engine_refuses_to_start(broken: str) -> None:
    for make in (AsyncOmni, Omni):
        with pytest.raises(ConfigError) as caught:
            make(model="demo")
        assert str(caught.value).startswith(broken)
        assert ": pip uninstall -y torchvision (" in str(caught.value)


def test_a_calibration_refuses_to_start(broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["calibrate-teacache", "demo"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vllm-omni: error: {broken}")


def test_all_packages_that_do_not_match_are_named_at_once(broken: str, tmp_path: Path) -> None:
    install(tmp_path, "torchaudio", ["libtorch_hip.so"])
    with pytest.raises(ConfigError, match=r" do not match .*: pip uninstall -y torchvision torchaudio \("):
        check_compiled_packages()


def test_a_package_without_a_fault_lets_the_start_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "torchvision", [])
    monkeypatch.syspath_prepend(tmp_path)
    check_compiled_packages()
