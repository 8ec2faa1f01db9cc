"""README and docs name real things: paths, modules, flags, links and anchors; README stays short."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

from vllm_omni.entrypoints.cli.args import parse_args

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
README_BYTES = 8 * 1024
BASES = (ROOT, ROOT / "src/vllm_omni", ROOT / "src/vllm_omni/diffusion", ROOT / "src/vllm_omni/diffusion/compute")
"""Folders that paths in the pages are relative to, besides the page's own."""
ROOMS = {path.name for base in BASES for path in base.iterdir() if path.is_dir() and path.name[0] not in "._"} - {
    "text"
}
"""Folders that a path may begin with; `text/html` is a media type."""
PUBLIC_FILES = {"text_to_image.py", "image_edit.py"}
"""Examples of the public vllm-omni package."""
OTHER_PROGRAMS = {"docs/flags.md", "docs/performance.md", "docs/cache_quality.md"}
"""Pages whose flags are those of other servers and of benchmarks."""
FLAGS_ELSEWHERE = {"--omni", "--images", "--device-memory"}
"""`--omni` is vLLM's to read; `--images` is a flag of `vllm-omni calibrate-teacache`, `--device-memory` of `plan`."""
PLACEHOLDERS = re.compile(r"[*<{]|yours|NAME|interval|\.\.\.")
"""Parts of a path that stand for many, or for files that the reader is to write."""


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_paths_exist(page: Path) -> None:
    assert [span for span in code_spans(page.read_text()) if is_missing_path(span, page)] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_modules_exist(page: Path) -> None:
    assert [name for name in module_names(page.read_text()) if not is_module(name)] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_and_anchors_resolve(page: Path) -> None:
    assert [link for link in links(page.read_text()) if not resolves(link, page)] == []


@pytest.mark.parametrize("page", [p for p in PAGES if str(p.relative_to(ROOT)) not in OTHER_PROGRAMS], ids=page_name)
def test_flags_exist(page: Path) -> None:
    assert [flag for flag in flags(page.read_text()) if flag not in FLAGS_ELSEWHERE | served_flags()] == []


def test_every_page_is_linked() -> None:
    linked = {
        (page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(page.read_text()) if link
    }
    assert [page_name(page) for page in PAGES[1:] if page not in linked] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


@pytest.mark.parametrize(
    ("span", "missing"),
    [
        ("src/vllm_omni/omni.py", False),
        ("control/engine.py", False),
        ("diffusion/compute/families/", False),
        ("tests/test_docs_paths.py::test_paths_exist", False),
        ("engine.py", False),
        ("families/*/info.py", False),
        ("text/html", False),
        ("make test", False),
        ("control/motor.py", True),
        ("motor.py", True),
        ("compute/engines", True),
    ],
)
def test_a_missing_path_is_found(span: str, missing: bool) -> None:
    assert is_missing_path(span, ROOT / "README.md") == missing


def test_a_missing_module_is_found() -> None:
    names = list(
        module_names("`python -m benchmarks.none`, vllm_omni.nowhere.Thing, `vllm_omni.inputs.data.LoRARequest`")
    )
    assert [name for name in names if not is_module(name)] == ["benchmarks.none", "vllm_omni.nowhere.Thing"]


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One `two`, three\n\n[a](#one-two-three) [b](#two) [c](none.md) [d](https://example.com/x.md)\n")
    assert [link for link in links(page.read_text()) if not resolves(link, page)] == ["#two", "none.md"]


def test_a_missing_flag_is_found() -> None:
    assert [f for f in flags("`--usp 2`, `--unknown-flag`, `--ssl-*`\n") if f not in served_flags()] == [
        "--unknown-flag"
    ]


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def is_missing_path(span: str, page: Path) -> bool:
    """Whether a code span names a file or folder of this repository that is not there."""
    path = span.partition("::")[0].rstrip("/")
    if not re.fullmatch(r"[\w./-]+", path) or PLACEHOLDERS.search(path) or path in PUBLIC_FILES:
        return False
    first, _, rest = path.partition("/")
    is_path = (bool(rest) and first in ROOMS) or re.fullmatch(r"[\w/-]+\.py", path)
    if not is_path or any((base / path).exists() for base in (*BASES, page.parent)):
        return False
    return path not in endings()


@cache
def endings() -> set[str]:
    """Every ending of a source file's path, from its name to the whole: `cache/base.py` is enough to find it."""
    files = [p.relative_to(ROOT) for top in ("src", "tests", "tools", "benchmarks") for p in (ROOT / top).rglob("*.py")]
    return {str(PurePosixPath(*file.parts[start:])) for file in files for start in range(len(file.parts))}


def module_names(text: str) -> list[str]:
    """Dotted names of our packages, as commands and imports have them; metrics (`vllm_omni:...`) are none."""
    return re.findall(r"(?<![\w./-])(?:vllm_omni|benchmarks|tools)(?:\.\w+)+", text)


def is_module(name: str) -> bool:
    """Whether at least the first part below the package is a module, or a name that the package exports."""
    package, first, *rest = name.split(".")
    folder = ROOT / "src/vllm_omni" if package == "vllm_omni" else ROOT / package
    if first[0].isupper():
        return first in (folder / "__init__.py").read_text()
    while (folder / first).is_dir() and rest and rest[0][0].islower():
        folder, first, *rest = folder / first, *rest
    return (folder / f"{first}.py").is_file() or (folder / first).is_dir()


def flags(text: str) -> list[str]:
    """Flags in code, without those that end with a `*`."""
    found = (re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w*-])", span) for span in re.findall(r"`[^`]+`", text))
    return [flag for flags_of_span in found for flag in flags_of_span]


@cache
def served_flags() -> set[str]:
    """Flags that `vllm serve --omni --help` shows."""
    with redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
        parse_args(["serve", "--omni", "--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", shown.getvalue()))


def links(text: str) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    return [link for link in found if not re.match(r"\w+:", link)]


def resolves(link: str, page: Path) -> bool:
    target, _, anchor = link.partition("#")
    path = (page.parent / target).resolve() if target else page
    return path.exists() and (not anchor or anchor in anchors(path.read_text()))


def anchors(text: str) -> Iterator[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        yield f"{slug}-{seen[slug]}" if seen[slug] else slug
        seen[slug] += 1
