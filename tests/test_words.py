"""Words of the code: docstrings and comments stand alone, and a class name has one meaning."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "src", "testbed", "tests", "tools")
RIDDLE = re.compile(r"(of|what|that)\b", re.IGNORECASE)
"""First word of a text that only a reader of the code beside it can complete."""


class Text(NamedTuple):
    """A docstring or a comment."""

    line: int
    text: str


def docstrings(tree: ast.AST) -> Iterator[Text]:
    """Docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        has_docstring = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for i, statement in enumerate(body):
            if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
                continue
            follows_attribute = i > 0 and isinstance(body[i - 1], ast.Assign | ast.AnnAssign)
            text = statement.value.value
            if isinstance(text, str) and (follows_attribute or (i == 0 and has_docstring)):
                yield Text(statement.lineno, text.strip())


def comments(source: str) -> Iterator[Text]:
    """Comments; lines of a block that continue the line above are left out."""
    last_line = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        stands_alone = not token.line[: token.start[1]].strip()
        if not (stands_alone and line == last_line + 1):
            yield Text(line, token.string.lstrip("# "))
        last_line = line if stands_alone else 0


def riddles(source: str) -> list[Text]:
    texts = (*docstrings(ast.parse(source)), *comments(source))
    return [text for text in texts if RIDDLE.match(text.text)]


def python_files(*folders: str) -> list[Path]:
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    return files


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_and_comments_begin_with_a_noun_or_a_verb(folder: str) -> None:
    found = []
    for file in python_files(folder):
        found += [f"{file.relative_to(ROOT)}:{line}: {text:.60}" for line, text in riddles(file.read_text())]
    assert not found, "\n".join(found)


def test_riddles_are_found_in_docstrings_attribute_docstrings_and_comments() -> None:
    source = '''
"""What this module holds."""

SIZE = 3  # of the cache
"""Of the cache."""
# Of one step: this one counts,
# that one continues it.
NAMES = ("of", "what")  # offered; whatever, thatched


class Cache:
    """That which is kept."""

    size: int = 0
    """Number of entries, of what is kept."""

    def __init__(self) -> None:
        self.count = 0
        """That the cache holds."""
        "What is no docstring, because it does not follow an attribute."


async def keep() -> str:
    """
    of a step
    """
    return "What is no docstring."
'''
    assert sorted(riddles(source)) == [
        Text(2, "What this module holds."),
        Text(4, "of the cache"),
        Text(5, "Of the cache."),
        Text(6, "Of one step: this one counts,"),
        Text(12, "That which is kept."),
        Text(19, "That the cache holds."),
        Text(24, "of a step"),
    ]


def test_a_class_name_is_defined_once() -> None:
    modules: dict[str, list[str]] = defaultdict(list)
    for file in python_files("src"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                modules[node.name].append(str(file.relative_to(ROOT)))
    shared = {name: files for name, files in modules.items() if len(files) > 1}
    assert not shared, shared
