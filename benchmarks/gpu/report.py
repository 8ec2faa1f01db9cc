"""Rows of measurements, each written to a file at once, so that a later run continues one that ended early."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.timing import Spread


@dataclass(frozen=True)
class Row:
    case: str
    measured: float | None = None
    unit: str = "ms"
    predicted: float | None = None
    """Prediction in the same unit; None: there is none."""
    spread: tuple[float, float] | None = None
    """Least and greatest value of the repeats."""
    refused: str = ""
    """Reason why there is no measurement; empty if there is one."""
    detail: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def milliseconds(cls, case: str, seconds: Spread, predicted: float | None = None, **detail: Any) -> Row:
        """Row in milliseconds from seconds. `predicted`: in milliseconds."""
        spread = (1e3 * seconds.least, 1e3 * seconds.most)
        return cls(case, 1e3 * seconds.median, "ms", predicted, spread, detail={"repeats": seconds.repeats, **detail})

    def line(self) -> str:
        """Line of a Markdown table."""
        predicted = "" if self.predicted is None else f"{self.predicted:.4g}"
        if self.measured is None:
            return f"| {self.case} | {predicted} | refused: {self.refused} | | |"
        ratio = f"{self.measured / self.predicted:.2f}" if self.predicted else ""
        detail = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.detail.items())
        return f"| {self.case} | {predicted} | {self.measured:.4g} {self.unit} | {ratio} | {detail} |"


@dataclass(frozen=True)
class Case:
    """A measurement, to be run unless its rows exist."""

    name: str
    run: Callable[[], list[Row]]
    predicted: float | None = None
    """Predicted milliseconds, printed before the case runs."""


class Report:
    def __init__(self, file: Path, environment: Mapping[str, Any]) -> None:
        """Continue `file` if it exists. Raises ValueError if it was measured on another machine."""
        self._file = file
        self._content: dict[str, Any] = {"environment": dict(environment), "cases": {}}
        if file.is_file():
            self._content = json.loads(file.read_text())
            if (there := self._content["environment"]) != dict(environment):
                raise ValueError(f"{file} was measured on {there}, this is {dict(environment)}: take another --out")

    @property
    def folder(self) -> Path:
        """Folder of the file and of the files that belong to its rows."""
        return self._file.parent

    def has(self, section: str, case: str) -> bool:
        return f"{section}/{case}" in self._content["cases"]

    def add(self, section: str, case: str, rows: list[Row]) -> None:
        self._content["cases"][f"{section}/{case}"] = [asdict(row) for row in rows]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(self._content, indent=1))

    def rows(self, section: str) -> list[Row]:
        return [
            Row(**values)
            for key, case in self._content["cases"].items()
            if key.startswith(f"{section}/")
            for values in case
        ]

    def table(self) -> str:
        lines = [f"{self._content['environment']}", ""]
        for section in dict.fromkeys(key.split("/")[0] for key in self._content["cases"]):
            lines += [f"### {section}", "", "| case | predicted | measured | ratio | |", "|---|---|---|---|---|"]
            lines += [row.line() for row in self.rows(section)] + [""]
        return "\n".join(lines)
