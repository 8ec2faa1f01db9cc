"""Check, without importing them, that packages compiled against PyTorch match the installed PyTorch.

transformers imports torchvision and torchaudio wherever they are installed. If one of them cannot be loaded, the start
fails late, with an error that does not name the cause (`operator torchvision::nms does not exist`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import Specifier
from packaging.version import Version

from vllm_omni.errors import ConfigError

NAMES = ("torchvision", "torchaudio")
_TORCH_LIBRARY = re.compile(rb"\0(lib(?:torch|c10)\w*\.so)(?=\0)")
"""Name of a PyTorch library in the string table of an ELF file."""


@dataclass(frozen=True)
class Package:
    """An installed package. `build`: version with build label, such as 0.28.0+cu130."""

    name: str
    build: str
    folder: Path
    requires: Sequence[str] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.build}"

    @property
    def cuda(self) -> str | None:
        """Major version of CUDA in the build label; None without a label."""
        label = re.search(r"\bcu(\d+)\d\b", self.build)
        return label[1] if label else None


def check_compiled_packages() -> None:
    """Raise ConfigError, which names a remedy, when torchvision or torchaudio does not match this PyTorch."""
    torch = _find("torch")
    if torch is None:
        return
    # Packages that are imported already have loaded without error.
    others = [package for name in NAMES if name not in sys.modules and (package := _find(name))]
    faults = [(package, fault) for package in others if (fault := find_fault(package, torch))]
    if faults:
        told = " and ".join(f"{package} ({fault})" for package, fault in faults)
        verb = "do" if len(faults) > 1 else "does"
        names = " ".join(package.name for package, _ in faults)
        raise ConfigError(
            f"{told} {verb} not match the installed {torch}: pip uninstall -y {names} (nothing here needs it), "
            "or install the build for this torch"
        )


def find_fault(package: Package, torch: Package) -> str | None:
    """Reason why `package` does not match `torch`, read from their files; None when none is found."""
    if missing := _missing_libraries(package, torch):
        return f"it needs {', '.join(sorted(missing))}"
    for requirement in map(Requirement, package.requires):
        if requirement.name != "torch" or not (
            requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ):
            continue
        if not all(_allows(specifier, Version(torch.build)) for specifier in requirement.specifier):
            return f"it requires torch{requirement.specifier}"
    if package.cuda and torch.cuda and package.cuda != torch.cuda:
        return f"it is built for CUDA {package.cuda}"
    return None


def _find(name: str) -> Package | None:
    try:
        spec, installed = find_spec(name), distribution(name)
    except PackageNotFoundError:
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0])
    # Some package indexes accept no build labels; then only this file has the label.
    written = folder / "version.py"
    label = re.search(r"^__version__ = '([^']+)'", written.read_text() if written.is_file() else "", re.MULTILINE)
    return Package(name, label[1] if label else installed.version, folder, installed.requires or ())


def _missing_libraries(package: Package, torch: Package) -> set[str]:
    """PyTorch libraries that the package is linked with and `torch` lacks: CUDA's in a CPU build, for example."""
    present = {path.name for path in (torch.folder / "lib").glob("*.so")}
    if "libtorch_cpu.so" not in present:
        return set()  # repackaged PyTorch: its libraries may be anywhere
    own = list(package.folder.rglob("*.so"))
    needed = {name.decode() for path in own for name in _TORCH_LIBRARY.findall(path.read_bytes())}
    return needed - present - {path.name for path in own}


def _allows(specifier: Specifier, torch: Version) -> bool:
    if specifier.operator == "==":
        # Compiled code works with all patch releases of its minor release.
        return Version(specifier.version.removesuffix(".*")).release[:2] == torch.release[:2]
    return specifier.contains(torch.base_version, prereleases=True)
