"""Names that modules of the public vllm-omni package have and ours do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def refuse_names(module: str, texts: Mapping[str, str], of_others: str | None = None) -> Callable[[str], Any]:
    """A `__getattr__` for `module` that says what to use here.

    `texts`: name to the text of the ImportError. `of_others`: the text for every other public name; None leaves these
    to Python.
    """

    def getattr_(name: str) -> Any:
        text = texts.get(name, None if name.startswith("_") else of_others)
        if text is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        raise ImportError(f"{module} has no {name}: {text}", name=module)

    return getattr_
