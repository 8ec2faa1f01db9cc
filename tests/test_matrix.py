"""Tables in README.md and docs/ are the generated ones, and every test that the feature table names exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from tools.matrix import TABLES, TEXTS, feature_table, with_table, with_tables

from tests.features import COLUMNS, FEATURES, Cell, Feature

ROOT = Path(__file__).parents[1]
CELLS = {f"{feature.name} / {column}": cell for feature in FEATURES for column, cell in zip(COLUMNS, feature.cells)}


@pytest.mark.parametrize("begin", TABLES)
def test_the_table_is_in_one_text_and_is_the_generated_one(begin: str) -> None:
    (path,) = [path for path in TEXTS if begin in path.read_text()]
    assert path.read_text() == with_tables(path.read_text()), "run python -m tools.matrix"


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
def test_the_tests_of_a_cell_exist(cell: Cell) -> None:
    assert list(flaws(cell)) == []


@pytest.mark.parametrize(
    ("cell", "flaw"),
    [
        (Cell("yes"), "'yes' names no test"),
        (Cell("[yes](docs/caches.md)"), "'[yes](docs/caches.md)' names no test"),
        (Cell("nothing to prove"), "'nothing to prove' names no test"),
        (Cell("yes", ("tests/test_none.py::test_x",)), "there is no tests/test_none.py"),
        (Cell("yes", ("tests/test_matrix.py::test_x",)), "tests/test_matrix.py has no test_x"),
        (Cell("yes", ("tests/test_matrix.py::flaws",)), "tests/test_matrix.py has no flaws"),
        (
            Cell("yes", ("tests/test_matrix.py::test_a_table_goes_between_its_markers[a]",)),
            "tests/test_matrix.py::test_a_table_goes_between_its_markers has no cases",
        ),
        (
            Cell("yes", ("tests/test_matrix.py::test_the_tests_of_a_cell_exist[" + "other]",)),
            "tests/test_matrix.py has no cases of other",
        ),
    ],
)
def test_a_cell_without_proof_is_found(cell: Cell, flaw: str) -> None:
    assert list(flaws(cell)) == [flaw]


@pytest.mark.parametrize("text", ["", "no", "no[^1]", "no: edits", "not yet", "not yet ([why](docs/caches.md))"])
def test_what_does_not_work_needs_no_proof(text: str) -> None:
    assert list(flaws(Cell(text))) == []


def test_a_feature_has_a_cell_a_column() -> None:
    with pytest.raises(ValueError, match="'x' needs 2 cells, got 1"):
        feature_table(("a", "b"), [Feature("x", (Cell("no"),))])


def test_a_table_goes_between_its_markers() -> None:
    with pytest.raises(ValueError, match="the text lacks"):
        with_table("no markers", "<!-- x: written -->", "a table")


def flaws(cell: Cell) -> Iterator[str]:
    """Reasons why the cell's text is not proven."""
    claims_nothing = re.match(r"(no|not yet)\b|$", cell.text)
    if not cell.tests and not claims_nothing:
        yield f"{cell.text!r} names no test"
    for test in cell.tests:
        path, _, name = test.partition("::")
        name, _, word = name.removesuffix("]").partition("[")
        if not (ROOT / path).is_file():
            yield f"there is no {path}"
        elif name not in (cases := find_tests(path)):
            yield f"{path} has no {name}"
        elif word and not cases[name]:
            yield f"{path}::{name} has no cases"
        elif word and word not in words_of(path):
            yield f"{path} has no cases of {word}"


@cache
def find_tests(path: str) -> dict[str, bool]:
    """The tests of a file, and whether each is run with several cases: its own, or those of a fixture in the file."""
    functions = [n for n in tree_of(path).body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    many = {f.name for f in functions if any("param" in ast.unparse(d) for d in f.decorator_list)}
    return {
        f.name: f.name in many or any(argument.arg in many for argument in f.args.args)
        for f in functions
        if f.name.startswith("test_")
    }


@cache
def words_of(path: str) -> set[str]:
    """Strings and names of a file, of which pytest makes the names of cases."""
    nodes = list(ast.walk(tree_of(path)))
    strings = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return strings | {n.id for n in nodes if isinstance(n, ast.Name)}


@cache
def tree_of(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())
