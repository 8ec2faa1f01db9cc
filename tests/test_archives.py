"""The wheel and the source archive: what they carry, and what they say of the project."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from email import message_from_string
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import pytest

from vllm_omni import __version__

ROOT = Path(__file__).parents[1]
TOP_FILES = ("LICENSE", "MANIFEST.in", "Makefile", "NOTICE", "README.md", "pyproject.toml", "setup.cfg")
FOLDERS = (".ci", "benchmarks", "deploy", "docs", "requirements", "src", "testbed", "tests", "tools")
CACHED = "module.cpython-311.pyc"
LARGE_BYTES = 1_000_000
MODELS = ("demo_model", "demo_video")
BROUGHT_BY = {
    "PIL": "pillow",
    "pydantic_core": "pydantic",
    "setproctitle": "vllm",
    "starlette": "fastapi",
    "tokenizers": "transformers",
    "triton": "torch",
    "uvloop": "vllm",
    "yaml": "pyyaml",
}
"""The required package that has or requires a module of another name."""
OPTIONAL = ("matplotlib",)
"""Modules whose absence is told in one line."""


def copy_without_weights(source: str, target: str) -> None:
    """Copy a file; a large one is cut to nothing, because only its name matters and packing takes seconds."""
    if Path(source).stat().st_size > LARGE_BYTES:
        Path(target).touch()
    else:
        shutil.copyfile(source, target)


def build(kind: str, source: Path, target: Path) -> Path:
    """Build "sdist" or "wheel" from the folder `source` as a build front end does: by the backend's hook."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = target.iterdir()
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unpacked source archive, made from a checkout in which the tests have run."""
    folder = tmp_path_factory.mktemp("archives")
    checkout = folder / "checkout"
    checkout.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, checkout / name, ignore=ignore, copy_function=copy_without_weights)
    for name in TOP_FILES:
        shutil.copyfile(ROOT / name, checkout / name)
    for package in ("src/vllm_omni", "src/vllm_omni/demo_model", "tests", "benchmarks", "docs"):
        (checkout / package / "__pycache__").mkdir()
        (checkout / package / "__pycache__" / CACHED).touch()
    (folder / "sdist").mkdir()
    with tarfile.open(build("sdist", checkout, folder / "sdist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the source archive, which therefore carries what that needs."""
    source = tmp_path_factory.mktemp("source") / "unpacked"
    shutil.copytree(sdist, source)
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as archive:
        return message_from_string(archive.read(f"vllm_omni-{__version__}.dist-info/METADATA").decode())


def files_of(*folders: str) -> set[str]:
    """Files of the checkout's folders, without what Python and the editable installation left there."""
    paths = {path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {str(path) for path in paths if path.suffix != ".pyc" and not path.parent.name.endswith(".egg-info")}


def test_the_wheel_carries_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"vllm_omni-{__version__}-py3-none-any.whl"
    package = {name.removeprefix("src/") for name in files_of("src")}
    weights = {f"vllm_omni/{name}/transformer/diffusion_pytorch_model.safetensors" for name in MODELS}
    assert {"vllm_omni/py.typed"} | weights <= package
    about = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE", "top_level.txt")
    with ZipFile(wheel) as archive:
        assert set(archive.namelist()) == package | {f"vllm_omni-{__version__}.dist-info/{name}" for name in about}


def test_the_source_archive_is_a_checkout(sdist: Path) -> None:
    names = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    names = {name for name in names if ".egg-info/" not in name}
    assert names == files_of(*FOLDERS) | {*TOP_FILES, "PKG-INFO"}


def test_what_the_readme_and_the_docs_link_to_is_in_the_source_archive(sdist: Path) -> None:
    cards = [sdist / "src/vllm_omni" / name / "README.md" for name in MODELS]
    pages = [sdist / "README.md", *sdist.glob("docs/**/*.md"), *cards]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)", page.read_text())]
    assert len(links) > 10
    assert [f"{page}: {link}" for page, link in links if not (page.parent / link).exists()] == []


def test_commands_of_the_readme_and_the_docs_are_in_the_source_archive(sdist: Path) -> None:
    pages = "\n".join(page.read_text() for page in (sdist / "README.md", *sdist.glob("docs/**/*.md")))
    modules = set(re.findall(r"python -m (benchmarks[\w.]*\w)", pages))
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)(?=`| +#)", pages, re.MULTILINE))
    assert modules
    assert "test" in targets
    places = [sdist / module.replace(".", "/") for module in modules]
    assert [place for place in places if not (place.with_suffix(".py").exists() or place.is_dir())] == []
    makefile = (sdist / "Makefile").read_text()
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
    scripts = set(re.findall(r"\b(?:tools|requirements|benchmarks)/[\w./-]+\.\w+", makefile))
    assert scripts
    assert [script for script in scripts if not (sdist / script).exists()] == []


def test_the_metadata_names_every_python_that_is_tried(metadata: Message) -> None:
    named = re.findall(r"Python :: (3\.\d+)\n", "".join(f"{c}\n" for c in metadata.get_all("Classifier", [])))
    assert metadata["Requires-Python"] == f">={named[0]}"
    assert [int(version.partition(".")[2]) for version in named] == [*range(11, 11 + len(named))]
    assert len(named) == 3


def test_the_metadata_describes_the_project(metadata: Message) -> None:
    assert (metadata["Name"], metadata["License-Expression"]) == ("vllm-omni", "Apache-2.0")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).startswith("# vllm-omni\n")
    classifiers = metadata.get_all("Classifier", [])
    assert "Typing :: Typed" in classifiers
    assert not [name for name in classifiers if name.startswith("License ::")], "the licence is an SPDX expression"
    urls = [line.split(", ", 1) for line in metadata.get_all("Project-URL", [])]
    assert urls
    assert all(len(label) <= 32 and url.startswith("https://") for label, url in urls)


def test_the_metadata_requires_what_the_package_imports(metadata: Message) -> None:
    """An installation of the wheel alone must not live on what the tests' packages bring along."""
    lines = [line for line in metadata.get_all("Requires-Dist", []) if 'extra == "dev"' not in line]
    required = {re.split(r"[\s<>=!~;\[]", line)[0].replace("-", "_") for line in lines}
    text = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    imported = set(re.findall(r"^ *(?:from|import) (\w+)", text, re.MULTILINE)) - sys.stdlib_module_names
    assert len(imported) > 20
    assert {BROUGHT_BY.get(module, module) for module in imported} - required == {"vllm_omni", *OPTIONAL}
